"""Find the parameters that weight decay leaves alone (section 3.3): one rule, used by every trainer."""

from __future__ import annotations

from torch import nn

from vwn.nn.connection import Connection


def no_weight_decay(module: nn.Module) -> set[str]:
    """Return the names of the parameters of ``module`` that must not be decayed: biases and norm gains.

    The static ``A`` and ``B`` of a connection are the biases of its routing, and named so. Everywhere else these are
    the parameters of fewer than two dimensions, or whose name ends in ``bias``. The dynamic ``W`` and the scales ``S``
    of a connection are decayed, also where a scale is a single number (Hyper-Connections, mHC). transformers'
    ``Trainer`` goes by the names and spares the same ones.
    """
    spared = {name for name, p in module.named_parameters() if p.ndim < 2 or name.rsplit(".", 1)[-1].endswith("bias")}
    for prefix, child in module.named_modules():
        if isinstance(child, Connection):
            dot = f"{prefix}." if prefix else ""
            spared |= {dot + name for name in child.shapes if "bias" in name}
            spared -= {dot + name for name in child.shapes if "scale" in name}
    return spared & dict(module.named_parameters()).keys()  # frozen matrices are no parameters
