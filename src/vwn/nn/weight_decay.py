"""Which parameters weight decay leaves alone (section 3.3): one rule, used by every trainer."""

from __future__ import annotations

from torch import nn

from vwn.nn.connection import Connection


def no_weight_decay(module: nn.Module) -> set[str]:
    """Names of the parameters of ``module`` that must not be decayed.

    They are the static ``A`` and ``B`` of every connection, and by the usual rule biases and norm gains, that is every
    parameter of fewer than two dimensions or whose name ends in ``bias``. The dynamic ``W`` and the scales ``S`` are
    decayed; of Hyper-Connections and mHC, whose scales are single numbers, the dynamic ``W`` alone.
    """
    parameters = dict(module.named_parameters())
    names = {name for name, p in parameters.items() if p.ndim < 2 or name.rsplit(".", 1)[-1].endswith("bias")}
    for prefix, child in module.named_modules():
        if isinstance(child, Connection):
            names |= {f"{prefix}.{name}".lstrip(".") for name in child.not_decayed}
    return names & parameters.keys()  # frozen matrices are no parameters
