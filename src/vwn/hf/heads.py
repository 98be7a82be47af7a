"""Other tasks than language modelling, through transformers' generic heads: reward models, taggers, span extraction."""

from typing import Any

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from vwn.hf.modeling import VirtualWidthPreTrainedModel


class _TaskModel(VirtualWidthPreTrainedModel):
    """A base model with a task's head. MTP modules stay in it, untrained."""

    model: Any

    def post_init(self) -> None:
        """As in transformers; no gradients for MTP modules, which predict tokens."""
        super().post_init()
        self.model.mtp.requires_grad_(False)


class VirtualWidthForSequenceClassification(GenericForSequenceClassification, _TaskModel):
    """Score a sequence by its last token that is no padding: ``[B, labels]``. With one label, a reward model."""

    new_weights = ("score.",)


class VirtualWidthForTokenClassification(GenericForTokenClassification, _TaskModel):
    """Score every token: ``[B, S, labels]``."""

    new_weights = ("score.",)


class VirtualWidthForQuestionAnswering(GenericForQuestionAnswering, _TaskModel):
    """Score every token as the start and as the end of an answer: ``[B, S]`` twice."""

    new_weights = ("qa_outputs.",)
    get_input_embeddings = VirtualWidthPreTrainedModel.get_input_embeddings
    set_input_embeddings = VirtualWidthPreTrainedModel.set_input_embeddings
