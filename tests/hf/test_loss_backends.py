"""The training loss with and without logits in memory: in chunks and Liger-Kernel's, which Triton interprets here."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import perturb
from tiny import build, token_ids, vwn_config
from vwn.common.errors import UserError
from vwn.hf import loss as loss_module
from vwn.hf.loss import choose_loss


@pytest.fixture(autouse=True)
def _choose_afresh():
    loss_module._choose_loss.cache_clear()
    yield
    loss_module._choose_loss.cache_clear()


WITHOUT_LOGITS = pytest.mark.parametrize("backend", ["chunked", "liger"])


def with_and_without_logits(model, without, **inputs):
    """Output and gradients with logits and without."""
    results = []
    for backend in ("torch", without):
        model.loss_backend = backend
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        results.append((out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {"m": 2, "n": 4}),
        ("llama", {"m": 2, "n": 4, "num_mtp_modules": 2}),
        ("llama", {"m": 1, "n": 1, "connection": "residual", "table_factor": 2, "num_mtp_modules": 1}),
    ],
)
@WITHOUT_LOGITS
def test_loss_and_gradients_are_those_with_logits(backend, kind, fields, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 1)  # chunks of 64 tokens
    model = perturb(build(vwn_config(kind, **fields))).train()
    ids = token_ids(5, 30)
    labels = ids.clone()
    labels[0, :3] = -100
    (with_logits, wanted), (without, actual) = with_and_without_logits(model, backend, input_ids=ids, labels=labels)
    assert with_logits.logits is not None
    assert without.logits is None
    assert len(without.losses) == 1 + fields.get("num_mtp_modules", 0)
    assert_close(without.loss, with_logits.loss, rtol=1e-5, atol=1e-5)
    assert_close(torch.stack(without.losses), torch.stack(with_logits.losses), rtol=1e-5, atol=1e-5)
    assert actual.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert_close(actual[name], grad, rtol=1e-4, atol=1e-5 * float(1 + grad.abs().max()), msg=name)


def test_the_chunked_loss_is_computed_in_float32_under_autocast_and_its_backward_may_run_twice():
    model = perturb(build(vwn_config("llama", 2, 4))).train()
    ids, losses = token_ids(), []
    for model.loss_backend in ("torch", "chunked"):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(ids, labels=ids).loss)
    assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    once, again = (torch.autograd.grad(losses[1], model.lm_head.weight, retain_graph=True)[0] for _ in range(2))
    assert (losses[1].dtype, torch.equal(once, again)) == (torch.float32, True)


@WITHOUT_LOGITS
def test_the_kernel_really_ran(backend, monkeypatch):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1)).train()
    model.loss_backend = backend
    calls, heads = [], []
    fused = loss_module.fused_cross_entropy
    monkeypatch.setattr("vwn.hf.causal_lm.fused_cross_entropy", lambda *a: (calls.append(1), fused(*a))[1])
    linear = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (heads.append(self), linear(self, x))[1])
    model(token_ids(), labels=token_ids())
    assert len(calls) == 2
    assert not any(head is model.lm_head for head in heads)


def test_evaluation_and_asked_for_mtp_logits_have_logits():
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    model.loss_backend = "liger"
    assert model.eval()(token_ids(), labels=token_ids()).logits is not None
    assert len(model.train()(token_ids(), labels=token_ids(), output_mtp_logits=True).mtp_logits) == 1


def test_auto_takes_torch_on_a_cpu_and_says_so_once(caplog):
    model = build(vwn_config("llama", 2, 4)).train()
    with caplog.at_level(logging.INFO, logger="vwn.hf"):
        for _ in range(2):
            assert model(token_ids(), labels=token_ids()).logits is not None
    assert [r.message for r in caplog.records if r.name == "vwn.hf"] == [
        "training loss on cpu: torch, with all logits in memory (not Liger-Kernel: it runs on a GPU, not on cpu)"
    ]


def test_what_cannot_run_is_refused(monkeypatch):
    with pytest.raises(UserError, match="auto, torch, chunked, liger; got 'cuda'"):
        choose_loss("cuda", torch.device("cpu"))
    monkeypatch.setattr(loss_module, "CAN_CHUNK", False)
    with pytest.raises(UserError, match=r"needs PyTorch 2\.13 or newer, not 2\."):
        choose_loss("chunked", torch.device("cpu"))
    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed \(pip install '.\[liger\]'\)"):
        choose_loss("liger", torch.device("cpu"))
    loss_module._choose_loss.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="runs on a GPU, not on cpu"):
        choose_loss("liger", torch.device("cpu"))


@WITHOUT_LOGITS
def test_a_loss_function_or_head_of_the_users_own_is_kept(backend):
    model = build(vwn_config("llama", 2, 4)).train()
    model.loss_backend = backend
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=f"'{backend}' needs an unembedding without bias, hooks"):
        model(token_ids(), labels=token_ids())
    hook.remove()
    model.loss_function = lambda logits, labels, vocab_size, shift_labels, **_: F.cross_entropy(
        logits.flatten(0, 1), shift_labels.flatten(), reduction="sum"
    )
    with pytest.raises(UserError, match="and the usual loss function"):
        model(token_ids(), labels=token_ids())
    model.loss_backend = "auto"
    assert model(token_ids(), labels=token_ids()).logits is not None
