"""Choose the code that runs the ops: ``"reference"``, ``"compiled"`` (C++ on a CPU) or ``"triton"`` (a GPU).

``"auto"`` takes the fastest that runs for the device and dtype at hand, and says once what it took and why. A backend
asked for by name runs or raises.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch

from vwn.common.errors import UserError

BACKENDS = ("auto", "reference", "compiled", "triton")
_FASTEST_FIRST = {"cpu": ("compiled", "reference"), "cuda": ("triton", "reference")}

_log = logging.getLogger("vwn.ops")


@cache
def module(name: str) -> ModuleType:
    """Return the module of a backend, which has the functions of :mod:`vwn.ops.reference`; imported when first used."""
    return importlib.import_module(f"vwn.ops.{name}")


def check_backend(name: str) -> str:
    """Return ``name``; a ``UserError`` if no backend has it."""
    if name not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


@torch.compiler.assume_constant_result
def choose(name: str, device: torch.device, dtype: torch.dtype, slots: int = 1) -> str:
    """Return the backend that runs for states of this device, dtype and number of slots when ``name`` was asked for.

    Raises:
        UserError: unknown, or asked for by name and unable to run there.
    """
    return _choose(name, device.type, dtype, slots)


@cache
def _choose(name: str, device_type: str, dtype: torch.dtype, slots: int) -> str:
    device = torch.device(device_type)
    if check_backend(name) != "auto":
        if reason := module(name).unavailable(device, dtype, slots):
            raise UserError(f"backend {name!r} cannot run here: {reason}; use 'auto' to take one that can")
        return name
    passed_over: list[str] = []
    for candidate in _FASTEST_FIRST.get(device_type, ("reference",)):
        reason = module(candidate).unavailable(device, dtype, slots)
        if reason is None:
            level = logging.WARNING if passed_over else logging.INFO
            why = "; ".join(passed_over) or "the fastest there is for it"
            _log.log(level, "virtual width on %s, %s: backend %r (%s)", device_type, dtype, candidate, why)
            return candidate
        passed_over.append(f"not {candidate!r}: {reason}")
    raise AssertionError("the reference runs everywhere")
