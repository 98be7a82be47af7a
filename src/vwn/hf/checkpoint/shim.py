"""Loads this checkpoint with the installed package vwn. Nothing of the model is defined here."""

from vwn.hf import (
    VirtualWidthConfig,
    VirtualWidthForCausalLM,
    VirtualWidthForQuestionAnswering,
    VirtualWidthForSequenceClassification,
    VirtualWidthForTokenClassification,
    VirtualWidthModel,
)

__all__ = [
    "VirtualWidthConfig",
    "VirtualWidthForCausalLM",
    "VirtualWidthForQuestionAnswering",
    "VirtualWidthForSequenceClassification",
    "VirtualWidthForTokenClassification",
    "VirtualWidthModel",
]
