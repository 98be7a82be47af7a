"""Virtual width in transformers. Importing this registers the Auto classes."""

from vwn.hf.versions import check_transformers

check_transformers()  # before anything is imported that an older one lacks

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vwn.hf.causal_lm import VirtualWidthForCausalLM
from vwn.hf.configuration import VirtualWidthConfig
from vwn.hf.conversion import widen, widen_checkpoint
from vwn.hf.heads import (
    VirtualWidthForQuestionAnswering,
    VirtualWidthForSequenceClassification,
    VirtualWidthForTokenClassification,
)
from vwn.hf.layouts import Layout, Sublayer, layout_of, register_layout
from vwn.hf.model import VirtualWidthModel
from vwn.hf.outputs import VirtualWidthCausalLMOutput, VirtualWidthModelOutput
from vwn.hf.trainer_mixin import MultiTokenTrainerMixin

AutoConfig.register("virtual_width", VirtualWidthConfig)
AutoModel.register(VirtualWidthConfig, VirtualWidthModel)
AutoModelForCausalLM.register(VirtualWidthConfig, VirtualWidthForCausalLM)
AutoModelForQuestionAnswering.register(VirtualWidthConfig, VirtualWidthForQuestionAnswering)
AutoModelForSequenceClassification.register(VirtualWidthConfig, VirtualWidthForSequenceClassification)
AutoModelForTokenClassification.register(VirtualWidthConfig, VirtualWidthForTokenClassification)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["virtual_width"] = "VirtualWidthForCausalLM"  # Trainer's label smoothing shifts these

__all__ = [
    "Layout",
    "MultiTokenTrainerMixin",
    "Sublayer",
    "VirtualWidthCausalLMOutput",
    "VirtualWidthConfig",
    "VirtualWidthForCausalLM",
    "VirtualWidthForQuestionAnswering",
    "VirtualWidthForSequenceClassification",
    "VirtualWidthForTokenClassification",
    "VirtualWidthModel",
    "VirtualWidthModelOutput",
    "layout_of",
    "register_layout",
    "widen",
    "widen_checkpoint",
]
