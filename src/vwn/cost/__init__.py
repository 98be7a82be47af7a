"""Cost of a model with virtual width in parameters, FLOPs and bytes, before anything is run.

The formulas of section 3.5 are in :mod:`vwn.cost.connection`, whole models in :mod:`vwn.cost.model`, training runs on a
cluster in :mod:`vwn.cost.cluster`. The functions below are imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vwn.cost.connection import connection_cost
    from vwn.cost.model import model_cost
    from vwn.cost.table import cost_table

__all__ = ["connection_cost", "cost_table", "model_cost"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vwn.cost' has no attribute {name!r}")
    return getattr(import_module(f"vwn.cost.{name.removesuffix('_cost').removeprefix('cost_')}"), name)
