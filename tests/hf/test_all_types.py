"""Every causal language model of the installed transformers, widened, on one model of each: all it does stays right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import supported_models
import zoo
from vwn import UserError, VirtualWidthConfig, VirtualWidthForCausalLM, widen
from vwn.nn.generalized import GeneralizedHyperConnection

GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "fixed cache": {"cache_implementation": "static", "disable_compile": True},
    "drafts": {"prompt_lookup_num_tokens": 2},
}
FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")
FLAGS += ("_can_compile_fullgraph", "_compatible_flash_implementations", "_supports_context_parallel")
ADDED_LOSSES: dict[str, dict[str, Any]] = {
    "bamba": {"z_loss_coefficient": 0.1},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
}
MTP_TYPES = ("llama", "gpt2", "gemma3_text", "deepseek_v3", "qwen3_next", "bamba", "mamba")


def ids_of(rows: int = 2, length: int = 9) -> Tensor:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(3))
    ids[:, -3:] = ids[:, 1:4]  # repeats itself, so that a look-up in the prompt finds drafts
    return ids


def test_every_type_is_built_or_has_a_reason() -> None:
    assert sorted([*zoo.CAUSAL_TYPES, *zoo.NOT_DECODERS]) == sorted(
        {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"virtual_width"}
    )


def test_the_page_has_every_type() -> None:
    lines = supported_models.PAGE.read_text().splitlines()
    types = [line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")]
    assert types == [name for name in supported_models.NAMES if name != "virtual_width"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", zoo.CAUSAL_TYPES)
def test_a_type(model_type: str) -> None:
    model, wide = supported_models.widened(model_type)
    row, text = supported_models.row(model_type, model, wide), supported_models.PAGE.read_text()
    assert "WRONG" not in row
    if f"transformers\n{transformers.__version__}," in text:  # else the page is of another version
        assert row in text.splitlines()
    check_mtp_from_a_config(model_type)
    if isinstance(wide, UserError):
        assert "\n" not in str(wide)
        return
    check_gauge(model_type, model)
    check_generation(model, wide)
    check_attention(model_type)
    if model_type in ADDED_LOSSES:
        model = zoo.tiny_causal_lm(model_type, **ADDED_LOSSES[model_type])
        wide = widen(model, m=2, n=3)
    check_loss(model_type, model, wide)


def change_gauge(wide: VirtualWidthForCausalLM, spread: float = 0.3) -> None:
    """Other weights everywhere, same function: the state is kept as ``G_k H`` after write ``k``, for m = 1.

    The plain residual stream is row 0 of ``H``; the others hold what it must not be mixed with: other rows of the
    table, if it is as wide as the state, and other shares of what is written. Each read, carry, write and the reduce
    undo and redo the change.
    """
    n = wide.config.n
    generator = torch.Generator().manual_seed(5)

    def gauge() -> torch.Tensor:
        return torch.eye(n, dtype=torch.float64) + spread * torch.rand(n, n, generator=generator, dtype=torch.float64)

    g = torch.eye(n, dtype=torch.float64)
    with torch.no_grad():
        table = wide.model.embed_tokens.table.weight
        if table.shape[1] > wide.config.hidden_size:
            table[:, wide.config.hidden_size :] = table[:, : wide.config.hidden_size].flip(0)
        for layer in wide.model.layers:
            for connection in layer.connections:
                assert isinstance(connection, GeneralizedHyperConnection)
                after, back = gauge(), torch.linalg.inv(g)
                connection.bias_alpha[:, :1] = back.T[:, :1]
                connection.bias_alpha[:, 1:] = (after @ back).T
                shares = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 2 - 1
                shares[0] = 1
                connection.bias_beta.copy_((after @ shares).T)
                g = after
        rows = torch.kron(torch.linalg.inv(g)[:1], torch.eye(wide.config.hidden_size, dtype=torch.float64))
        wide.model.reduce.weight.copy_(rows)


def check_gauge(model_type: str, model: Any) -> None:
    """In another gauge every routing weight differs from its start and from its neighbours', and the logits do not."""
    embedding = "replicated" if model_type == "inkling_text" else "direct"
    wide = widen(model, m=1, n=2, embedding=embedding, check=False)
    change_gauge(wide)
    with torch.no_grad():
        plain, ours = model(ids_of()).logits, wide(ids_of()).logits
    assert_close(ours, plain, rtol=2e-3, atol=2e-3 * plain.abs().max().item())
    with torch.no_grad():  # and it is a test: one read out of place shows
        wide.model.layers[1].connections[0].bias_alpha[1, 0] += 0.5
        moved = wide(ids_of()).logits
    assert (moved - plain).abs().max() > 10 * (ours - plain).abs().max()


def check_generation(model: Any, wide: Any) -> None:
    """The plain model's tokens: greedy in a padded batch, beams, a fixed cache, drafts."""
    mask = torch.ones_like(ids_of())
    mask[0, :3] = 0
    runs = [(name, ids_of(1), options) for name, options in WAYS.items()]
    runs.append(("padded", ids_of(), {"attention_mask": mask}))
    for name, ids, options in runs:
        try:
            plain = model.generate(ids, **GREEDY | options)
        except Exception:  # what transformers cannot do, it need not do for us
            assert name != "padded"
            continue
        assert torch.equal(wide.generate(ids, **GREEDY | options), plain), name


def check_mtp_from_a_config(model_type: str) -> None:
    """It trains, or one sentence says why not."""
    fields = {"m": 2, "n": 4, "num_mtp_modules": 1, "embedding": "replicated", "tie_word_embeddings": False}
    try:
        wide = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=zoo.tiny_config(model_type), **fields))
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "\n" not in refusal
        assert model_type not in MTP_TYPES
        return
    out = wide(ids_of(), labels=ids_of())
    assert len(out.losses) == 2
    assert out.loss.isfinite()


def check_loss(model_type: str, model: Any, wide: Any) -> None:
    """The plain model's training loss, with all that it adds to the cross-entropy."""
    coefficient = next((n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(model, n)), None)
    if coefficient is not None:  # large enough to show
        for owner in (model, model.config, wide.config.backbone):
            setattr(owner, coefficient, 0.7)
    mask = torch.ones_like(ids_of())
    mask[0, :3] = 0
    model.train()
    wide.train()
    for options in ({}, {"output_router_logits": True, "attention_mask": mask})[: 1 if coefficient is None else 2]:
        plain, ours = outputs_of(model, **options), outputs_of(wide, **options)
        assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-5)
        aux_loss = getattr(plain, "aux_loss", None)
        if aux_loss is not None:
            assert_close(ours.aux_loss, aux_loss, rtol=1e-5, atol=1e-5)
    if coefficient is not None and not model_type.startswith("llama4"):
        assert aux_loss is not None


def outputs_of(model: torch.nn.Module, **options: Any) -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return model(ids_of(), labels=ids_of(), **options)


def built(model_class: Any, config: Any, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config), **options)


def check_attention(model_type: str) -> None:
    """What the backbone's own causal LM would take, said by both configs, or refused as there."""
    plain_config = zoo.tiny_config(model_type)
    fields = {"m": 1, "n": 2, "embedding": "replicated", "tie_word_embeddings": False}
    config = VirtualWidthConfig(backbone=plain_config, **fields)
    plain_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(plain_config)]
    models = built(plain_class, plain_config), built(VirtualWidthForCausalLM, config)
    inner = [model.config.get_text_config() for model in models]
    for name in ("_attn_implementation", "_experts_implementation"):
        assert getattr(inner[1], name) == getattr(inner[0], name) == getattr(models[1].config, name)
    for flag in FLAGS:
        assert len({str(getattr(model, flag, None)) for model in models}) == 1, flag
    for request in ("eager", "sdpa"):
        taken = []
        for model in models:
            try:
                model.set_attn_implementation(request)
            except ValueError:
                taken.append("refused")
            else:
                taken.append(model.config._attn_implementation)
                assert model.config.get_text_config()._attn_implementation == taken[-1]
        assert taken[0] == taken[1], request


def test_a_plain_model_that_runs_eager_is_widened_so(tmp_path: Any) -> None:
    plain = zoo.tiny_causal_lm("llama")
    plain.set_attn_implementation("eager")
    wide = widen(plain, m=2, n=4)
    assert wide.config._attn_implementation == wide.model.backbone.config._attn_implementation == "eager"
    assert torch.equal(wide(ids_of()).logits, plain(ids_of()).logits)
    wide.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
