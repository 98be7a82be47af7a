"""What a model with virtual width costs, in parameters, FLOPs and bytes, before anything is run.

The formulas of section 3.5 are in :mod:`vwn.cost.connection`, whole models in :mod:`vwn.cost.model`, training runs on a
cluster in :mod:`vwn.cost.cluster`. The names below are imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vwn.cost.connection import ConnectionCost, connection_cost
    from vwn.cost.model import ForwardFlops, ModelCost, model_cost
    from vwn.cost.table import CostTable, cost_table

__all__ = ["ConnectionCost", "CostTable", "ForwardFlops", "ModelCost", "connection_cost", "cost_table", "model_cost"]

_HOMES = {
    "connection": ("ConnectionCost", "connection_cost"),
    "model": ("ForwardFlops", "ModelCost", "model_cost"),
    "table": ("CostTable", "cost_table"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"vwn.cost.{module}"), name)
    raise AttributeError(f"module 'vwn.cost' has no attribute {name!r}")
