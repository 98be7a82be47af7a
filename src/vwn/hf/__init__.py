"""Virtual width at home in transformers. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.conversion import widen, widen_checkpoint
from vwn.hf.layouts import Layout, Sublayer, layout_of, register_layout
from vwn.hf.model import (
    VirtualWidthCausalLMOutput,
    VirtualWidthForCausalLM,
    VirtualWidthModel,
    VirtualWidthModelOutput,
)

AutoConfig.register("virtual_width", VirtualWidthConfig)
AutoModel.register(VirtualWidthConfig, VirtualWidthModel)
AutoModelForCausalLM.register(VirtualWidthConfig, VirtualWidthForCausalLM)

__all__ = [
    "Layout",
    "Sublayer",
    "VirtualWidthCausalLMOutput",
    "VirtualWidthConfig",
    "VirtualWidthForCausalLM",
    "VirtualWidthModel",
    "VirtualWidthModelOutput",
    "layout_of",
    "register_layout",
    "widen",
    "widen_checkpoint",
]
