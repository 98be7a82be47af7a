"""Other tasks than language modelling, through transformers' generic heads: reward models, taggers, span extraction."""

from copy import deepcopy
from typing import Any

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from vwn.hf.model import VirtualWidthPreTrainedModel


class _WithoutMtp:
    """Mixin for a task's model: it has no MTP modules, which predict tokens."""

    def __init__(self, config: Any) -> None:
        config = deepcopy(config)
        config.num_mtp_modules = 0
        super().__init__(config)  # type: ignore[call-arg]


class VirtualWidthForSequenceClassification(_WithoutMtp, GenericForSequenceClassification, VirtualWidthPreTrainedModel):
    """Score a sequence by its last token that is no padding: ``[B, labels]``. With one label, a reward model."""

    new_weights = ("score.",)


class VirtualWidthForTokenClassification(_WithoutMtp, GenericForTokenClassification, VirtualWidthPreTrainedModel):
    """Score every token: ``[B, S, labels]``."""

    new_weights = ("score.",)


class VirtualWidthForQuestionAnswering(_WithoutMtp, GenericForQuestionAnswering, VirtualWidthPreTrainedModel):
    """Score every token as the start and as the end of an answer: ``[B, S]`` twice."""

    new_weights = ("qa_outputs.",)
    get_input_embeddings = VirtualWidthPreTrainedModel.get_input_embeddings
    set_input_embeddings = VirtualWidthPreTrainedModel.set_input_embeddings
