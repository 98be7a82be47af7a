"""transformers' own generic model tests on virtual-width models; `make .venv` fetches them with its source."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from unittest import TestCase
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import LlamaConfig, Qwen3MoeConfig

from vwn.hf import (
    VirtualWidthConfig,
    VirtualWidthForCausalLM,
    VirtualWidthForQuestionAnswering,
    VirtualWidthForSequenceClassification,
    VirtualWidthForTokenClassification,
    VirtualWidthModel,
)

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / f".cache/transformers-{transformers.__version__}/tests"
if not (SOURCE / "test_modeling_common.py").is_file():
    pytest.skip(
        f"the source distribution of transformers {transformers.__version__} is not in .cache (make .venv fetches it)",
        allow_module_level=True,
    )
pytest.importorskip("parameterized", reason="transformers' tests need parameterized")


def model_tests() -> ModuleType:
    """Import transformers' module of tests, without those of generation and of export.

    These are in folders of their own, which its source distribution leaves out.
    """
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE)]
    sys.modules["transformers_tests"] = package
    for folder, module, mixin in (
        ("exporters", "test_export", "ExportTesterMixin"),
        ("generation", "test_utils", "GenerationTesterMixin"),
    ):
        for name in (f"transformers_tests.{folder}", f"transformers_tests.{folder}.{module}"):
            sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


model_test_module = model_tests()
for kind, model_class in (
    ("MODEL", VirtualWidthModel),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION", VirtualWidthForSequenceClassification),
    ("MODEL_FOR_TOKEN_CLASSIFICATION", VirtualWidthForTokenClassification),
    ("MODEL_FOR_QUESTION_ANSWERING", VirtualWidthForQuestionAnswering),
):  # by these the tests choose labels; they list transformers' own classes
    names = getattr(model_test_module, f"{kind}_MAPPING_NAMES")
    setattr(model_test_module, f"{kind}_MAPPING_NAMES", {**names, "virtual_width": model_class.__name__})

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class TinyModels:
    """Configs and inputs, as transformers' tests ask for them."""

    batch_size, seq_length, is_training = 5, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    num_hidden_states_types = 2  # of width D and over-width

    def __init__(self, config: VirtualWidthConfig) -> None:
        self.config = config

    def get_config(self) -> VirtualWidthConfig:
        return deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[VirtualWidthConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Contracts(model_test_module.ModelTesterMixin):
    """transformers' tests, and what is adapted in them."""

    all_model_classes = (VirtualWidthModel, VirtualWidthForCausalLM)
    # One test demands those of generation, which the source distribution lacks.
    test_generation_tester_mixin_inheritance = None
    # These want a RuntimeError; ours is a UserError that names the way out (test_model_saving.py).
    test_load_with_mismatched_shapes = test_can_load_ignoring_mismatched_shapes = None

    def setUp(self):
        self.model_tester = TinyModels(self.make_config())

    @contextmanager
    def incomplete_checkpoints(self):
        """Load what is missing as transformers does, where a test looks at what it lists; ours refuse to."""
        with patch("vwn.hf.checkpoint.saving._check_complete"):
            yield

    def test_correct_missing_keys(self):
        with self.incomplete_checkpoints():
            super().test_correct_missing_keys()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with self.incomplete_checkpoints():
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_retain_grad_hidden_states_attentions(self):
        """Gradients pass through the over-width states; `hidden_states` are reduced from them, beside the graph."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = VirtualWidthModel._from_config(config, attn_implementation="eager")
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        kept = (out.over_width_hidden_states[0], out.attentions[0])
        for tensor in kept:
            tensor.retain_grad()
        out.last_hidden_state.flatten()[0].backward()
        assert all(tensor.grad is not None for tensor in kept)


class TestLlama(Contracts, TestCase):
    all_model_classes = (
        *Contracts.all_model_classes,
        VirtualWidthForSequenceClassification,
        VirtualWidthForTokenClassification,
        VirtualWidthForQuestionAnswering,
    )

    def test_attention_outputs(self):
        """The heads of other tasks return the hidden states of width D alone."""
        self.all_model_classes = Contracts.all_model_classes
        super().test_attention_outputs()

    def make_config(self):
        return VirtualWidthConfig(backbone=LlamaConfig(**SIZES), m=2, n=3)


@pytest.mark.slow
class TestLlamaWithMtp(Contracts, TestCase):
    def make_config(self):
        return VirtualWidthConfig(backbone=LlamaConfig(**SIZES), m=4, n=8, num_mtp_modules=1)


for name in [name for name in dir(Contracts) if name.startswith("test_eager_matches_batched_and_grouped")]:
    # of experts; our class, asked whether it has any, knows no backbone
    setattr(TestLlama, name, None)
    setattr(TestLlamaWithMtp, name, None)


class TestMixtureOfExpertsWithMtp(Contracts, TestCase):
    def make_config(self):
        experts = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
        return VirtualWidthConfig(backbone=Qwen3MoeConfig(**SIZES, **experts), m=4, n=8, num_mtp_modules=1)
