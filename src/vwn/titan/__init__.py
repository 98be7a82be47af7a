"""Virtual width in torchtitan 0.3: FSDP2 and HSDP, tensor, sequence, expert and pipeline parallelism.

``torchrun -m torchtitan.train --module vwn.titan --config debug``. Every import of torchtitan is in this package.
"""

try:
    import torchtitan  # noqa: F401
except ImportError as error:
    raise ImportError("vwn.titan needs torchtitan 0.3; pip install torchtitan==0.3.0") from error

from vwn.titan.sizes import Backbone, VirtualWidth, hf_config
from vwn.titan.trainer import VirtualWidthTrainer, adamw, model_spec

__all__ = ["Backbone", "VirtualWidth", "VirtualWidthTrainer", "adamw", "hf_config", "model_spec"]
