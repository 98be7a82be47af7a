"""Start the output matrices of attention and FFN: at zero, scaled with depth, or as the config says.

An output matrix is the last one of a sublayer, whose result is added to the residual stream. Small baselines train best
from zero: then every layer is the identity at first (results/parameterisation/README.md).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vwn.common.errors import UserError
from vwn.hf.anatomy import find_anatomy
from vwn.nn.connection import Connection
from vwn.training.config import OutputInit

_NAMES = re.compile(
    r"(?:^|\.)(?:o_proj|out_proj|c_proj|dense|dense_4h_to_h|down_proj|fc2|fc_out|w2|wo|output_linear)(?:\.weight)?$"
)
"""Names of the output matrices in transformers, stacked matrices of experts included."""


@torch.no_grad()
def start_outputs(model: PreTrainedModel, how: OutputInit) -> None:
    """Set the output matrices of every layer, MTP modules' layers included.

    Args:
        model: just initialised by its config; plain or of virtual width.
        how: ``"zero"``; ``"depth"``, which scales them by ``(2 L)^-1/2`` in a backbone of ``L`` layers; or
            ``"config"``, which leaves them. The latter two also divide by ``sqrt(n / m)`` where Hyper-Connections sum
            their streams, which keeps the sum's scale (arXiv 2409.19606).

    Raises:
        UserError: the output matrices cannot be identified.
    """
    factor = {"zero": 0.0, "depth": (2 * model.config.get_text_config().num_hidden_layers) ** -0.5, "config": 1.0}[how]
    if _sums_streams(model):
        factor *= model.config.geometry.ratio**-0.5
    if factor == 1:
        return
    for parameter in output_matrices(model).values():
        parameter.mul_(factor)


def output_matrices(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the last matrix of every attention, FFN and expert, by parameter name.

    Raises:
        UserError: a sublayer has none that its name and shape identify.
    """
    width = model.config.get_text_config().hidden_size
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for layer in _layers(model):
        for sublayer in _sublayers(layer):
            outputs = [p for m in sublayer for p in _outputs(m, width)]
            if not outputs:
                raise _unknown(
                    model, f"{names[id(next(sublayer[0].parameters()))]!r} belongs to a sublayer without one"
                )
            found |= {names[id(p)]: p for p in outputs}
    return found


def _layers(model: PreTrainedModel) -> list[Any]:
    ours = [m for m in model.modules() if hasattr(m, "anatomy")]
    if ours:
        return [layer for backbone in ours for layer in backbone.anatomy.layers(backbone)]
    base = model.base_model
    try:
        return [*find_anatomy(base).layers(base)]
    except UserError as error:
        raise _unknown(model, str(error)) from error


def _sublayers(layer: nn.Module) -> list[list[nn.Module]]:
    """Group the modules of a layer that hold matrices by sublayer; matrices of the layer's own together are one."""
    found: list[list[nn.Module]] = []
    own: list[nn.Module] = []
    for child in layer.children():
        if any(isinstance(m, Connection) for m in child.modules()) or all(p.ndim < 2 for p in child.parameters()):
            continue
        if any(child.children()):
            found.append([child])
        else:
            own.append(child)
    return [*found, [nn.ModuleDict({name: m for name, m in layer.named_children() if m in own})]] if own else found


def _outputs(sublayer: nn.Module, width: int) -> list[nn.Parameter]:
    found = []
    for name, p in sublayer.named_parameters():
        if not _NAMES.search(name) or p.ndim < 2:
            continue
        owner = sublayer.get_submodule(name.rpartition(".")[0])
        gives = p.shape[1] if isinstance(owner, Conv1D) else p.shape[0] if p.ndim == 2 else width
        if gives == width and width in p.shape:
            found.append(p)
    return found


def _unknown(model: Any, why: str) -> UserError:
    advice = "use --output-init config, which leaves them as they start"
    if _sums_streams(model):
        advice = "they have to be scaled where Hyper-Connections sum their streams; use --connection ghc or mhc"
    return UserError(f"the output matrices of {type(model).__name__} cannot be identified ({why}); {advice}")


def _sums_streams(model: Any) -> bool:
    return getattr(model.config, "connection", None) == "hc" and model.config.reduce == "sum"
