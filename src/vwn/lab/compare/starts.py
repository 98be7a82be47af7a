"""Arms that go on from a trained plain model: the model as it is, widened, or with wider FFNs.

Each computes what the trained model does until it is trained further.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM, widen
from vwn.hf.loading import load_model
from vwn.lab.compare.arms import Arm
from vwn.training.directory import locate
from vwn.training.model import initialise, resize_backbone


def start_models(arms: Iterable[Arm], source: str) -> dict[str, PreTrainedModel]:
    """Return the model that each arm starts from, by name.

    Args:
        arms: plain or `MxN`; a plain one that matches another gets as many parameters by wider FFNs.
        source: a trained plain model: a folder, a training run's or a checkpoint of one, or a hub id.

    Raises:
        UserError: a model that is not plain, or that cannot be widened or grown.
    """
    plain = plain_model(source)
    models: dict[str, PreTrainedModel] = {}
    for arm in sorted(arms, key=lambda arm: arm.matches is not None):  # what is matched must be known first
        if arm.matches:
            models[arm.name] = with_wider_ffn(plain, models[arm.matches[1]].num_parameters())
        elif arm.m is None or arm.n is None:
            models[arm.name] = plain
        else:
            models[arm.name] = widen(plain, m=arm.m, n=arm.n, **arm.width)
    return models


def write_starts(models: dict[str, PreTrainedModel], folder: Path) -> None:
    """Save the models that are not in `folder` yet, each whole or not at all."""
    for name, model in models.items():
        if not (folder / name).exists():
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            partial.rename(folder / name)


def plain_model(source: str) -> PreTrainedModel:
    """Return a trained plain model in float32, without MTP modules that it was trained with.

    Raises:
        UserError: there is none, it has virtual width, or its weights cannot be told from those of the MTP modules.
    """
    try:
        model = load_model(locate(source)).float()
    except OSError as error:
        raise UserError(f"--init-from: cannot load the weights {source!r} ({error})") from error
    if not isinstance(model, VirtualWidthForCausalLM):
        return model
    if model.config.connection != "residual" or model.config.table_factor > 1 or model.config.ngram_order > 1:
        raise UserError(f"--init-from {source} has virtual width or a wide table; give a trained plain model")
    plain = AutoModelForCausalLM.from_config(model.config.backbone)
    weights = {
        name.replace("model.backbone.", "model.").replace("embed_tokens.table.", "embed_tokens."): value
        for name, value in model.state_dict().items()
        if not name.startswith("model.mtp.")
    }
    try:
        plain.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"--init-from {source}: the weights of its {model.config.backbone.model_type} backbone cannot be taken out "
            "of it; give a model that was trained without --mtp"
        ) from error
    return plain


@torch.no_grad()
def with_wider_ffn(model: PreTrainedModel, parameters: int) -> PreTrainedModel:
    """Grow a model to about so many parameters: new hidden units in every FFN, which write zeros at first.

    Raises:
        UserError: it has more parameters already, or new units would change what it computes.
    """
    backbone: Any = model.config
    size = getattr(backbone, "intermediate_size", None)
    if size is None:
        raise UserError(f"a {backbone.model_type} has no intermediate_size to grow; drop the arm with match_params")
    per_unit = _count(resize_backbone(backbone, None, size + 1)) - _count(backbone)
    units = round((parameters - model.num_parameters()) / per_unit)
    if units < 1:
        raise UserError(
            f"the trained model has {model.num_parameters():,} parameters already, not below {parameters:,}"
        )
    grown = AutoModelForCausalLM.from_config(resize_backbone(backbone, None, size + units))
    initialise(grown, seed=0)
    old, new = model.state_dict(), grown.state_dict()
    for name, value in new.items():
        before = old[name]
        grew = [now - was for now, was in zip(value.shape, before.shape, strict=True)]
        if any(grew):
            if value.ndim > 2 or sorted(grew) != [0] * (value.ndim - 1) + [units]:
                raise UserError(
                    f"the FFNs of a {backbone.model_type} cannot be grown, as {name} holds several maps in one; leave "
                    "out the arm with match_params"
                )
            if value.ndim == 1 or not grew[0]:  # a bias, or [D, units], the map out of the FFN
                value.zero_()
        value[tuple(map(slice, before.shape))] = before
    return grown


def _count(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()
