"""torchtitan's trainer for models with virtual width: their sizes are fields of its config, hence on the command line.

``--backbone.hidden_size 4096 --virtual_width.m 2 --virtual_width.n 3`` make the model; ``model_spec`` follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, CrossEntropyLoss, cross_entropy_loss
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.deepseek_v3.mtp import roll_mtp_sequence
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type
from torchtitan.trainer import Trainer

from vwn.common.errors import UserError
from vwn.nn.groups import GROUPS, REDUCE_FACTOR, TABLE_FACTOR, check_factors, parameter_groups, routing_factor
from vwn.titan.data import keep_control_tokens_text
from vwn.titan.model import check_parallelism, model_config
from vwn.titan.parallelize import parallelize
from vwn.titan.sizes import Backbone, VirtualWidth, hf_config
from vwn.titan.state_dict_adapter import VirtualWidthStateDictAdapter


class Optimizers(OptimizersContainer):
    """AdamW on the groups of :func:`vwn.parameter_groups`, or torchtitan's own groups where the config has some."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's, with the rate, the decay, and the groups' shares of the rate."""

        learning_rate: float = 3e-4
        """Peak rate of the backbone."""
        weight_decay: float = 0.1
        """Weight decay, but for what :func:`vwn.no_weight_decay` spares."""
        rate_factors: dict[str, float] = field(default_factory=dict)
        """Shares of the rate by group, in place of the defaults: `table 1 reduce 1 routing 1` is one rate for all."""

    def __init__(self, config: Config, *, model_parts: list[Any]) -> None:
        self.config = config
        super().__init__(config, model_parts=model_parts)

    def _build_param_groups(self, model: Any, param_group_configs: Any, impl_kwargs: dict[str, Any]) -> Any:
        """Split the parameters of a pipeline stage, or of the whole model."""
        c = self.config
        if c.param_groups:
            return OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
        factors = dict.fromkeys(GROUPS, 1.0) | c.rate_factors
        names = {id(p): canonical_fqn(name) for name, p in model.named_parameters()}
        options = {**impl_kwargs, "betas": (0.9, 0.95), "eps": 1e-8}
        groups = [
            {**group, **options, "param_names": [names[id(p)] for p in group["params"]]}
            for group in parameter_groups(model, c.learning_rate, c.weight_decay, factors=factors)
        ]
        patterns = [f"{group['param_names'][0]}, ..." for group in groups]  # what torchtitan's log shows of a group
        return {"AdamW": groups}, {"AdamW": patterns}


def rate_factors(backbone: Backbone, width: VirtualWidth) -> dict[str, float]:
    """Return the default shares of the rate, those of :func:`vwn.nn.groups.default_factors` for the whole model."""
    factors = {"table": TABLE_FACTOR}  # its rows start at unit variance
    if hf_config(backbone, width).reduce == "linear":
        factors["reduce"] = REDUCE_FACTOR
    if width.carry_constraint != "doubly_stochastic":
        factors["routing"] = routing_factor(2 * backbone.num_hidden_layers)
    return factors


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
        if isinstance(config.optimizer, Optimizers.Config):
            config.optimizer.rate_factors = rate_factors(b, w) | check_factors(config.optimizer.rate_factors)
            logger.info(f"shares of the learning rate: {config.optimizer.rate_factors}")
        check_parallelism(config.parallelism, b, w)
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


class MultiTokenLoss(BaseLoss):
    """Cross-entropy of the next token plus λ times the sum of the further tokens' (section 3.4), per target.

    Each head's sum is divided by its own targets: for the further tokens, the number over all ranks and accumulated
    batches times this batch's share of them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """λ, and the vocabulary, whose logits are spread over ranks under tensor parallelism."""

        weight: float = 0.3
        global_vocab_size: int | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = cross_entropy_loss
        self._maybe_compile(compile_config)
        self.weight, self.vocab_size = config.weight, config.global_vocab_size

    def __call__(
        self, pred: Any, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take logits ``[B, S, V]`` of the next and each further token; ``labels`` ``[B, S]`` are shifted by one."""
        counted = (labels != IGNORE_INDEX).sum().clamp(min=1)
        loss = self.fn(pred[0], labels, global_vocab_size=self.vocab_size)
        for ahead, logits in enumerate(pred[1:], 1):
            targets = roll_mtp_sequence(labels, shift=ahead, fill_value=IGNORE_INDEX, positions=kwargs.get("positions"))
            further = self.fn(logits, targets, global_vocab_size=self.vocab_size)
            loss = loss + self.weight * counted / (targets != IGNORE_INDEX).sum().clamp(min=1) * further
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


def loss_config(backbone: Backbone, width: VirtualWidth) -> Any:
    """Return the next token's cross-entropy; with MTP modules the further tokens' as well."""
    if not width.num_mtp_modules:
        return CrossEntropyLoss.Config(global_vocab_size=backbone.vocab_size)
    return MultiTokenLoss.Config(weight=width.mtp_loss_weight, global_vocab_size=backbone.vocab_size)


def adamw(learning_rate: float, weight_decay: float = 0.1, **options: Any) -> Optimizers.Config:
    """Configure AdamW on the groups of :func:`vwn.parameter_groups`, with the rates and the decay of `vwn train`.

    Args:
        learning_rate: peak rate of the backbone.
        weight_decay: of the decayed parameters.
        options: further fields of the config, such as ``rate_factors={"table": 1, "reduce": 1}``.
    """
    return Optimizers.Config(learning_rate=learning_rate, weight_decay=weight_decay, **options)
