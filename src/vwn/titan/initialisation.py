"""Initial weights of a model of torchtitan: each from the seed and its own name, whatever the parallelism.

A matrix is drawn in blocks of rows, each with a generator of its own, so that a rank draws little more than its shard
and every sharding, pipelined or not, starts from the same values.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.nn_modules import RMSNorm

from vwn.nn.embedding import EMBEDDING_STD
from vwn.nn.initialisation import StatesItsInitialValues
from vwn.titan.modules import local

ROWS = 1024
"""Rows that one generator draws."""
_OUTPUTS = ("attention.wo.weight", "feed_forward.w2.weight", "inner_experts.w2_EDF")
"""Ends of the names of the last matrix of an attention, an FFN and the experts."""


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float, output_std: float) -> None:
    """Set every parameter: parts of virtual width as they state, gains to one, the table, then matrices.

    Args:
        model: a model or a pipeline stage of it, sharded or not.
        seed: the same on every rank.
        std: standard deviation of the backbone's matrices.
        output_std: of the last matrix of every attention and FFN.
    """
    for prefix, module in model.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if not p.is_meta}
        key = f"{seed}/{canonical_fqn(prefix)}"
        if isinstance(module, StatesItsInitialValues):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(key))
                values = module.initial_values()
            for name, parameter in own.items():
                local(parameter).copy_(values[name][_box(parameter)])
            continue
        for name, parameter in own.items():
            if isinstance(module, RMSNorm):
                local(parameter).fill_(1.0)
            elif name == "bias":
                local(parameter).zero_()
            elif isinstance(module, Embedding):
                _draw(parameter, f"{key}.{name}", EMBEDDING_STD)
            else:
                _draw(parameter, f"{key}.{name}", output_std if f"{key}.{name}".endswith(_OUTPUTS) else std)


def _draw(parameter: Tensor, key: str, std: float) -> None:
    """Draw normal values of standard deviation ``std``, in blocks of rows of the first dimension."""
    shard, box = local(parameter), _box(parameter)
    if std == 0:
        shard.zero_()
        return
    first, last = box[0].start, box[0].stop
    for start in range(first - first % ROWS, last, ROWS):
        generator = torch.Generator().manual_seed(_seed(f"{key}/{start}"))
        stop = min(start + ROWS, parameter.shape[0])
        rows = torch.randn(stop - start, *parameter.shape[1:], generator=generator) * std
        low, high = max(start, first), min(stop, last)
        shard[low - first : high - first].copy_(rows[(slice(low - start, high - start), *box[1:])])


def _box(parameter: Tensor) -> tuple[slice, ...]:
    """Return the slices of the whole tensor that this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(o, o + s) for s, o in zip(shape, offset, strict=True))


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()[:7], "big")
