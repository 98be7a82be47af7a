"""The classes of :mod:`vwn.nn` as torchtitan's modules: built from a ``Config``, sharded by a plan.

``m`` segments, ``n`` slots, ``d`` segment width, ``D' = n d``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.module import Module, ModuleList

import vwn.nn.connection
import vwn.nn.embedding
import vwn.nn.multi_token
from vwn.nn.embedding import repeat_over_slots
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.geometry import Geometry
from vwn.nn.initialisation import StatesItsInitialValues


def local(t: Tensor) -> Tensor:
    """Return this rank's part of a tensor. The state is a plain tensor, sublayers return ``DTensor``."""
    return t.to_local() if isinstance(t, DTensor) else t


class Part(Module):
    """A module that works on this rank's tokens and has its small weights whole on every rank.

    Under tensor parallelism a weight is a replicated ``DTensor``, and its attribute is a plain tensor. With a sharded
    sequence the ranks' gradients, each of its own tokens, are summed.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """A class of this module, and what it takes."""

        part: type[Part]
        arguments: dict[str, Any]

        def build(self, **kwargs: Any) -> Part:
            """Make the module."""
            made = self.part(**self.arguments)
            made._sharding_config = self.sharding_config
            return made

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not isinstance(value, DTensor) or value.device_mesh.mesh_dim_names != ("tp",):
            return value
        assert self._sharding_config is not None
        layout = self._sharding_config.state_shardings[name].per_axis_spmd_types()[MeshAxisName.TP]
        return value.to_local(grad_placements=[Partial() if layout is spmd.R else Replicate()])

    def _init_self_parameters(self) -> None:
        """Do nothing: the model initialises all weights in one place (:mod:`vwn.titan.initialisation`)."""


class Norm(RMSNorm):
    """The engine's RMSNorm, whose plan names the argument ``input``; torch before 2.14 calls it ``x``."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        """The engine's config."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``."""
        return super().forward(input)


class Read(vwn.nn.connection.Read, Part):
    """The read of a connection, for hooks."""


class Write(vwn.nn.connection.Write, Part):
    """The write of a connection, for hooks."""


class Connection(GeneralizedHyperConnection, Part):
    """One sublayer's connection to the over-width state (eq. 10)."""

    def __init__(self, geometry: Geometry, dynamic: bool, carry_constraint: str, backend: str) -> None:
        g = geometry
        super().__init__(g.hidden_size, g.m, g.n, dynamic, carry_constraint, False, backend=backend)
        self.read, self.write = Read(), Write()


class Connections(vwn.nn.connection.Connections, ModuleList):
    """The connections of one block, which FSDP2 shards as a unit of their own: their weights stay float32."""


class Reduce(vwn.nn.embedding.OverWidthReduce, Part):
    """Map the final state back to the backbone's width."""


class ReducedNorm(Module):
    """Reduce, then the backbone's final norm; the engine calls both ``norm``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Configs of the two."""

        reduce: Part.Config
        norm: Norm.Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.reduce = config.reduce.build()
        self.norm = config.norm.build()

    def forward(self, state: Tensor) -> Tensor:
        """Map ``[B, S, D']`` to ``[B, S, D]``."""
        return self.norm(self.reduce(state))


class Expand(StatesItsInitialValues, Part):
    """The linear ``D -> D'`` of the factorised embedding (section 3.2)."""

    parameter_group = "expansion"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(geometry.over_width, geometry.hidden_size))

    def initial_values(self) -> dict[str, Tensor]:
        """Draw values as :class:`vwn.nn.embedding.OverWidthEmbedding` does: the rows keep their variance."""
        return {"weight": torch.randn(self.weight.shape) * self.weight.shape[1] ** -0.5}

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D']``."""
        return F.linear(rows, self.weight).to(rows.dtype)


class OverWidthEmbedding(Module):
    """Map token ids to the first state: the engine's vocabulary-parallel table, expanded as its form says."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """``table`` is ``V x D'`` for the direct form, else ``V x D``."""

        geometry: Geometry
        form: str
        table: Embedding.Config
        expand: Part.Config | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.geometry, self.form = config.geometry, config.form
        self.table = config.table.build()
        self.expand = None if config.expand is None else config.expand.build()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, S]`` to ``[B, S, D']``."""
        rows = local(self.table(tokens))
        if self.expand is not None:
            return self.expand(rows)
        return repeat_over_slots(rows, self.geometry) if self.form == "replicated" else rows


class Block(TransformerBlock):
    """The engine's attention and FFN (or experts) between two connections instead of two residual adds."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        """The engine's config, and the connections of attention and FFN."""

        connections: list[Part.Config]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = config.attention.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()
        self.connections = Connections(connection.build() for connection in config.connections)
        self.moe_enabled = config.moe is not None  # the name by which the engine finds experts
        if config.moe is not None:
            self.moe = config.moe.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(self, state: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        """``[B, S, D'] -> [B, S, D']``: read, run, write, twice (eq. 10); ``S`` is the rank's share of the sequence."""
        connections: Any = self.connections
        attention, ffn = connections

        def run(state: Tensor) -> Tensor:
            x = attention.read(state)
            z = local(self.attention(self.attention_norm(x), attention_masks, positions))
            state, x = attention.write_read(state, z, ffn)
            z = local(self.ffn(self.ffn_norm(x)))
            return ffn.write(state, z)

        return connections(state, run)

    @property
    def ffn(self) -> nn.Module:
        """The second sublayer."""
        return self.moe if self.moe_enabled else self.feed_forward


class BlockLinear(vwn.nn.multi_token.BlockLinear, Part):
    """The small matrix of an MTP module, shared by the slots."""


class Predictor(vwn.nn.multi_token.MultiTokenPredictor, Part):  # with a Config of its own
    """One MTP module (section 3.4): fuse, one more block, reduce, norm."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Configs of its parts; the engine looks for ``attention`` and ``moe`` as in a block."""

        geometry: Geometry
        layer: Block.Config
        fuse: Part.Config
        reduce: Part.Config
        norm: Norm.Config

        @property
        def attention(self) -> Any:
            """Attention of the block, whose positions the engine sets to the run's."""
            return self.layer.attention

        @property
        def moe(self) -> Any:
            """Experts of the block, which the engine sets up."""
            return self.layer.moe

    def __init__(self, config: Config) -> None:
        super().__init__(config.geometry, config.layer.build(), config.reduce.build(), config.norm.build())
        self.fuse = config.fuse.build()

    @property
    def moe_enabled(self) -> Any:
        """Return whether the block has experts."""
        return self.layer.moe_enabled

    @property
    def moe(self) -> Any:
        """The block's experts."""
        return self.layer.moe
