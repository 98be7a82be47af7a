"""Virtual Width Networks (arXiv 2511.11238): a wide representation around a transformer of ordinary width.

``import vwn`` needs torch only. The Hugging Face model is ``vwn.hf``; its names are also reachable here, lazily.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vwn.common.errors import UserError
from vwn.common.version import __version__
from vwn.nn.connection import Connection, Routing
from vwn.nn.embedding import OverWidthEmbedding, OverWidthReduce
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.geometry import Geometry
from vwn.nn.multi_token import BlockLinear, MultiTokenPredictor
from vwn.nn.relatives import HyperConnection, ManifoldHyperConnection
from vwn.nn.weight_decay import no_weight_decay

if TYPE_CHECKING:
    from vwn.hf import VirtualWidthConfig, VirtualWidthForCausalLM, VirtualWidthModel, widen


_FROM_HF = ("VirtualWidthConfig", "VirtualWidthForCausalLM", "VirtualWidthModel", "widen")

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
    "widen",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_HF:
        return getattr(import_module("vwn.hf"), name)
    raise AttributeError(f"module 'vwn' has no attribute {name!r}")
