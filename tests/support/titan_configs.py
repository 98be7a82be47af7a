"""Configurations of torchtitan runs in the tests: tiny, on rows of their own, every weight away from its start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import IterableDataset
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TrainingConfig

import vwn.titan.model
from vwn.titan import Backbone, VirtualWidth, config_registry, initialisation

SIZES = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, attention="sdpa",
)  # fmt: skip


def initialise(model, *options):
    """Start as the package does, and then move every weight: nothing stays zero or the identity."""
    initialisation.initialise(model, *options)
    for name, parameter in model.named_parameters():
        move = torch.empty_like(parameter)
        initialisation._draw(move, f"move/{name}", 0.1)
        parameter.add_(move)


vwn.titan.model.initialise = initialise


class Rows(IterableDataset):
    """Row ``i`` for rank ``i mod ranks``, so that a global batch is the same rows for any number of ranks."""

    def __init__(self, rank, ranks, length):
        self.rank, self.ranks, self.length, self.at = rank, ranks, length, 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.at * self.ranks + self.rank)
            row = torch.randint(0, SIZES["vocab_size"], (self.length + 1,), generator=generator)
            self.at += 1
            yield {"input": row[:-1], "positions": torch.arange(self.length)}, row[1:]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class RowsLoader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, tokenizer, seq_len, local_batch_size, **kwargs):
        rows = Rows(dp_rank, dp_world_size, seq_len)
        super().__init__(rows, dp_rank=dp_rank, dp_world_size=dp_world_size, batch_size=local_batch_size)


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **kwargs):
        pass

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    def decode(self, *args, **kwargs):
        raise NotImplementedError

    def get_vocab_size(self):
        return SIZES["vocab_size"]


def tiny(**width):
    c = config_registry.config(
        Backbone(**SIZES),
        VirtualWidth(**{"m": 2, "n": 3} | width),
        learning_rate=1e-3,
        hf_assets_path=".",
        dataset="c4_test",
        training=TrainingConfig(
            local_batch_size=4, seq_len=16, steps=4, disable_cuda_graphs=True, mixed_precision_param="float32"
        ),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        log_freq=1,
    )
    c.dataloader, c.tokenizer = RowsLoader.Config(), NoTokenizer.Config()
    c.optimizer.implementation = "for-loop"
    c.checkpoint = CheckpointManager.Config(interval=2, last_save_model_only=False)
    c.debug.seed = 7
    return c


def tiny_mtp():
    return tiny(num_mtp_modules=1)


def tiny_experts():
    c = tiny()
    c.backbone.num_experts = 4
    torch.Tensor.bfloat16 = torch.Tensor.float  # the engine computes experts in bfloat16, whatever the weights are
    return c
