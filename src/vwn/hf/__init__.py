"""Virtual width at home in transformers. Importing this registers the Auto classes."""

from vwn.hf.versions import check_transformers

check_transformers()  # before anything is imported that an older one lacks

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.conversion import widen, widen_checkpoint
from vwn.hf.layouts import Layout, Sublayer, layout_of, register_layout
from vwn.hf.modeling import (
    VirtualWidthCausalLMOutput,
    VirtualWidthForCausalLM,
    VirtualWidthModel,
    VirtualWidthModelOutput,
)
from vwn.hf.structure import find_structure

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
    "find_structure",
    "layout_of",
    "register_layout",
    "widen",
    "widen_checkpoint",
]
