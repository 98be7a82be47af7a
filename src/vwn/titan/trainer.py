"""torchtitan's trainer for models with virtual width: their sizes are fields of its config, hence on the command line.

``--backbone.hidden_size 4096 --virtual_width.m 2 --virtual_width.n 3`` make the model; ``model_spec`` follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type
from torchtitan.trainer import Trainer

from vwn.common.errors import UserError
from vwn.nn.groups import routing_factor
from vwn.titan.data import keep_control_tokens_text
from vwn.titan.loss import MultiTokenLoss
from vwn.titan.model import check_parallelism, model_config
from vwn.titan.parallelize import parallelize
from vwn.titan.sizes import Backbone, VirtualWidth
from vwn.titan.state_dict_adapter import VirtualWidthStateDictAdapter

ROUTING = r"\.connections\.\d+(?=\.).*"
"""Parameters of the connections, by name."""
NO_DECAY = r"(norm\.weight|_norm|_norm_bias|\.bias|\.bias_alpha|\.bias_beta)$"
"""Parameters that weight decay leaves alone, by name: those of :func:`vwn.no_weight_decay`."""


class VirtualWidthTrainer(Trainer):
    """Makes the model from the sizes, then is torchtitan's trainer."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """torchtitan's, with the sizes of the model."""

        backbone: Backbone = field(default_factory=Backbone)
        virtual_width: VirtualWidth = field(default_factory=VirtualWidth)

    def __init__(self, config: Config) -> None:
        if not device_module.is_available():
            raise UserError(
                f"torchtitan trains on GPUs and finds no {device_type} device here; on a CPU use vwn train (torchrun "
                "starts it on several processes)"
            )
        b, w = config.backbone, config.virtual_width
        config.model_spec = model_spec(b, w)
        config.loss = loss_config(b, w)
        slow_routing(config.optimizer, b, w)
        check_parallelism(config.parallelism, b, w, b.num_hidden_layers)
        super().__init__(config)
        if (tokens := self.tokenizer.get_vocab_size()) > b.vocab_size:
            raise UserError(
                f"the tokenizer in {config.hf_assets_path} has {tokens} tokens, backbone.vocab_size is {b.vocab_size}; "
                "make it as large"
            )
        keep_control_tokens_text(self.tokenizer)


def model_spec(backbone: Backbone, width: VirtualWidth) -> ModelSpec:
    """Describe a model to torchtitan: its parts, and how it is sharded, pipelined and converted."""
    return ModelSpec(
        name="vwn",
        flavor=f"D{backbone.hidden_size}L{backbone.num_hidden_layers}-{width.m}x{width.n}",
        model=model_config(backbone, width),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=VirtualWidthStateDictAdapter,
    )


def loss_config(backbone: Backbone, width: VirtualWidth) -> Any:
    """The next token's cross-entropy; with MTP modules the further tokens' as well."""
    if not width.num_mtp_modules:
        return CrossEntropyLoss.Config(global_vocab_size=backbone.vocab_size)
    return MultiTokenLoss.Config(weight=width.mtp_loss_weight, global_vocab_size=backbone.vocab_size)


def slow_routing(optimizer: Any, backbone: Backbone, width: VirtualWidth) -> None:
    """Have the routing of a deep model learn at :func:`vwn.nn.groups.routing_factor` of the rate.

    Only of :func:`adamw`'s two groups, which become four: groups of one's own say all themselves.
    """
    groups = optimizer.param_groups
    factor = routing_factor(2 * backbone.num_hidden_layers)
    if factor == 1 or width.carry_constraint != "none" or [g.pattern for g in groups] != [NO_DECAY, r".*"]:
        return
    slowed = []
    for group in groups if width.dynamic else groups[:1]:
        options = {**group.optimizer_kwargs, "lr": group.optimizer_kwargs["lr"] * factor}
        slowed.append(replace(group, pattern=ROUTING + group.pattern, optimizer_kwargs=options))
    logger.info(f"the routing learns at {factor:.3g} of the rate over {2 * backbone.num_hidden_layers} sublayers")
    optimizer.param_groups = slowed + groups


def adamw(learning_rate: float, weight_decay: float = 0.1, **options: Any) -> OptimizersContainer.Config:
    """AdamW in two groups: static routing, gains and biases undecayed, everything else decayed."""

    def group(pattern: str, decay: float) -> ParamGroupConfig:
        common = dict(lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=common)

    return OptimizersContainer.Config(param_groups=[group(NO_DECAY, 0.0), group(r".*", weight_decay)], **options)
