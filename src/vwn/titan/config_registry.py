"""Configurations to start from: ``torchrun -m torchtitan.train --module vwn.titan --config NAME``.

Each is a function without arguments. Options on the command line, or a function of your own, change what it returns.
"""

from __future__ import annotations

from typing import Any

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from vwn.titan import data  # noqa: F401  # adds the formats of files to torchtitan's data sets
from vwn.titan.sizes import Backbone, VirtualWidth
from vwn.titan.trainer import VirtualWidthTrainer, adamw, model_spec


def debug() -> VirtualWidthTrainer.Config:
    """Configure six layers of 256 and ``r = 1.5``, for a first look: with a tokenizer and a file of your own.

    ``--hf_assets_path FOLDER`` has the ``tokenizer.json``, ``--dataloader.dataset_path FILE`` the text.
    """
    return config(
        Backbone(),
        VirtualWidth(),
        learning_rate=3e-3,
        hf_assets_path=".",
        dataset="jsonl",
        training=TrainingConfig(local_batch_size=8, seq_len=512, steps=10, disable_cuda_graphs=True),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        log_freq=1,
    )


def llama_8b() -> VirtualWidthTrainer.Config:
    """Configure Llama 3 8B with ``(m, n) = (2, 3)``: ``r = 1.5``. The rate is Llama's, untuned here."""
    return config(
        Backbone(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        VirtualWidth(),
        learning_rate=3e-4,
        hf_assets_path="./assets/hf/Llama-3.1-8B",
        dataset="c4",
        training=TrainingConfig(local_batch_size=1, seq_len=8192, steps=1000, disable_cuda_graphs=True),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=200),
    )


def config(
    backbone: Backbone,
    width: VirtualWidth,
    *,
    learning_rate: float,
    hf_assets_path: str,
    dataset: str,
    training: TrainingConfig,
    lr_scheduler: Any,
    log_freq: int = 10,
) -> VirtualWidthTrainer.Config:
    """Make a trainer's config from sizes, a rate and data; for a registry of your own."""
    return VirtualWidthTrainer.Config(
        backbone=backbone,
        virtual_width=width,
        model_spec=model_spec(backbone, width),
        hf_assets_path=hf_assets_path,
        optimizer=adamw(learning_rate),
        lr_scheduler=lr_scheduler,
        training=training,
        dataloader=HuggingFaceTextDataLoader.Config(dataset=dataset),
        metrics=MetricsProcessor.Config(log_freq=log_freq),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),  # the others shard with torch 2.14 only
        checkpoint=CheckpointManager.Config(interval=500, last_save_model_only=False),
        activation_checkpoint=SelectiveAC.Config(),
        debug=DebugConfig(save_config_file="config.json"),  # which vwn.titan.export reads
    )
