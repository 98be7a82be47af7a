"""Every causal language model of the installed transformers, widened: logits, gauge, generation. One model of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import supported_models
import zoo
from vwn import UserError, VirtualWidthForCausalLM, widen
from vwn.nn.generalized import GeneralizedHyperConnection

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS: dict[str, dict[str, Any]] = {
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 2},
    "fixed cache": {"cache_implementation": "static", "disable_compile": True},
    "drafts": {"prompt_lookup_num_tokens": 2},
}


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
    if isinstance(wide, UserError):
        assert "\n" not in str(wide)
        return
    check_gauge(model_type, model)
    check_generation(model, wide)


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
    wide = widen(model, m=1, n=2, embedding="replicated" if model_type == "inkling_text" else "direct")
    change_gauge(wide)
    with torch.no_grad():
        plain, ours = model(ids_of()).logits, wide(ids_of()).logits
    torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3 * plain.abs().max().item())
    with torch.no_grad():  # and it is a test: one read out of place shows
        wide.model.layers[1].connections[0].bias_alpha[1, 0] += 0.5
        moved = wide(ids_of()).logits
    assert (moved - plain).abs().max() > 10 * (ours - plain).abs().max()


def check_generation(model: Any, wide: Any) -> None:
    """The plain model's tokens: greedy, padded batches, beams, caches, drafts."""
    mask = torch.ones_like(ids_of())
    mask[0, :3] = 0
    runs = [(name, ids_of(1), options) for name, options in WAYS.items()]
    runs += [("greedy", ids_of(1), {}), ("padded", ids_of(), {"attention_mask": mask})]
    for name, ids, options in runs:
        try:
            plain = model.generate(ids, **GREEDY | options)
        except Exception:  # what transformers cannot do, it need not do for us
            assert name not in ("greedy", "padded")
            continue
        assert torch.equal(wide.generate(ids, **GREEDY | options), plain), name
