"""Virtual Width Networks (arXiv 2511.11238): a wide representation around a transformer of ordinary width.

Every name is imported when it is used. All but the Hugging Face model, ``vwn.hf``, need torch only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vwn.common.version import __version__

if TYPE_CHECKING:
    from vwn.common.errors import UserError
    from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM, VirtualWidthModel, widen
    from vwn.nn.connection import Connection, Routing
    from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce
    from vwn.nn.generalized import GeneralizedHyperConnection
    from vwn.nn.geometry import Geometry
    from vwn.nn.groups import parameter_groups
    from vwn.nn.multi_token import BlockLinear, MultiTokenPredictor
    from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection
    from vwn.nn.weight_decay import no_weight_decay

# Imported when they are used: the command line answers --help without torch, and hf needs transformers.
_HOMES = {
    "nn.generalized": ("GeneralizedHyperConnection",),
    "nn.embedding": ("OverWidthEmbedding", "OverWidthReduce"),
    "common.errors": ("UserError",),
    "nn.geometry": ("Geometry",),
    "nn.groups": ("parameter_groups",),
    "hf": ("VirtualWidthConfig", "VirtualWidthForCausalLM", "VirtualWidthModel", "widen"),
    "nn.multi_token": ("BlockLinear", "MultiTokenPredictor"),
    "nn.relatives": ("HyperConnection", "ManifoldHyperConnection"),
    "nn.connection": ("Connection", "Routing"),
    "nn.weight_decay": ("no_weight_decay",),
}

__all__ = [
    "BlockLinear",
    "Connection",
    "GeneralizedHyperConnection",
    "Geometry",
    "HyperConnection",
    "ManifoldHyperConnection",
    "MultiTokenPredictor",
    "OverWidthEmbedding",
    "OverWidthReduce",
    "Routing",
    "UserError",
    "VirtualWidthConfig",
    "VirtualWidthForCausalLM",
    "VirtualWidthModel",
    "__version__",
    "no_weight_decay",
    "parameter_groups",
    "widen",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"vwn.{module}"), name)
    raise AttributeError(f"module 'vwn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
