"""Training end to end on a small text: what a run leaves behind, pairing of arms, golden losses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from runs import config
from vwn import no_weight_decay
from vwn.training.checkpoint.manifest import last_checkpoint
from vwn.training.config import WidthOptions
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.run import load_corpus, train
from vwn.training.trainer import VirtualWidthTrainer, head_losses

GOLDEN = Path(__file__).parents[1] / "support" / "golden_losses.json"


def test_a_run_learns_and_leaves_everything_behind(finished):
    run, result = finished
    first, last = result.curve[0], result.curve[-1]
    assert first["tokens"] == 0
    assert last["tokens"] == 20 * 4 * 32
    assert last["loss"] < first["loss"] - 0.5
    assert last["loss_2"] < first["loss_2"] - 0.5
    assert result.peak_memory_bytes > 2**20
    assert result.tokens_per_second > 0
    stored = json.loads((run.out / "run.json").read_text())
    assert stored["config"]["m"] == 4
    assert stored["config"]["corpus.window"] == 32
    assert stored["versions"]["torch"] == torch.__version__
    assert {"command", "machine", "created"} <= set(stored)
    assert json.loads((run.out / "result.json").read_text())["curve"] == result.curve
    assert list((run.out / "logs").glob("events.*"))
    assert not list(run.out.glob("*.bin"))
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run.out).parameters()) == result.params


def test_losses_are_logged_separately_for_training_and_validation(finished):
    run, result = finished
    history = json.loads((last_checkpoint(run.out) / "trainer_state.json").read_text())["log_history"]
    training = [h for h in history if "loss" in h]
    assert len(training) == 10
    for entry in training:
        assert entry["objective"] == pytest.approx(entry["loss"] + 0.3 * entry["loss_2"], rel=1e-5)
    validation = [h for h in history if "eval_loss" in h]
    assert [h["tokens"] for h in validation] == [p["tokens"] for p in result.curve]


def test_validation_losses_are_means_over_the_windows(finished, text):
    run, result = finished
    corpus = load_corpus(run)
    model = AutoModelForCausalLM.from_pretrained(run.out).eval()
    ids = torch.stack([corpus.valid[i * len(corpus.valid) // 16]["input_ids"] for i in range(16)])
    with torch.no_grad():
        out = model(ids, labels=ids, output_mtp_logits=True)
    nll = -out.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    nll_2 = -out.mtp_logits[0].log_softmax(-1)[:, :-2].gather(-1, ids[:, 2:, None]).mean().item()
    assert result.curve[-1]["loss"] == pytest.approx(nll, abs=1e-5)
    assert result.curve[-1]["loss_2"] == pytest.approx(nll_2, abs=1e-5)


@pytest.mark.slow
def test_final_validation_also_when_the_interval_does_not_divide_the_steps(tmp_path, text):
    result = train(config(tmp_path / "run", text, optim={"steps": 3}, eval_every=2, save_every=100))
    assert [p["tokens"] // 128 for p in result.curve] == [0, 2, 3]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-3"


def test_plain_without_mtp_is_a_stock_model(tmp_path, text):
    result = train(config(tmp_path / "run", text, m=None, n=None, width=WidthOptions(), optim={"steps": 1}))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run")) is LlamaForCausalLM
    assert (result.name, result.m, result.n, result.r) == ("plain", 1, 1, 1.0)
    assert result.curve[-1]["loss_2"] is None


def test_arms_of_a_seed_start_from_the_same_backbone():
    backbone = load_backbone("nano", 300, 32)
    plain = build_model(backbone, 3).state_dict()
    arms = [
        build_model(model_config(backbone, m, n, WidthOptions(mtp=mtp)), 3).state_dict()
        for m, n, mtp in ((None, None, 1), (4, 10, 1), (1, 4, 0))
    ]
    for arm in arms:
        for name, value in plain.items():
            if "embed_tokens" not in name:
                ours = name.replace("model.layers", "model.backbone.layers")
                assert torch.equal(arm[ours], value), name
    for name, value in arms[0].items():  # the MTP modules' backbone layers are shared as well
        if ".mtp.0.layer." in name:
            assert torch.equal(arms[1][name], value), name
    assert not torch.equal(build_model(backbone, 4).state_dict()["lm_head.weight"], plain["lm_head.weight"])


def test_presets_start_at_the_scale_of_their_width():
    config = model_config(load_backbone("tiny", 300, 32), 4, 16, WidthOptions(mtp=1))
    state = build_model(config, 0, embedding_std=1.0).state_dict()
    assert state["model.embed_tokens.table.weight"].std() == pytest.approx(1, rel=0.05)
    assert state["model.backbone.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert state["lm_head.weight"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert state["model.norm.weight"].eq(1).all()


@pytest.mark.slow
def test_data_order_depends_on_the_seed_alone(tmp_path, text, monkeypatch):
    def batches(name, m, n, seed):
        seen = []
        compute = VirtualWidthTrainer.compute_loss

        def recording(self, model, inputs, return_outputs=False, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return compute(self, model, inputs, return_outputs, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(VirtualWidthTrainer, "compute_loss", recording)
            train(config(tmp_path / name, text, m, n, seed=seed, optim={"steps": 3}))
        return torch.stack(seen)

    plain, wide, other = batches("a", None, None, 0), batches("b", 4, 8, 0), batches("c", 4, 8, 1)
    assert torch.equal(plain, wide)
    assert not torch.equal(wide, other)
    assert len(plain.flatten(0, 1).unique(dim=0)) == 12  # no window twice within a pass


def test_the_optimiser_decays_by_the_one_rule(tmp_path, text, monkeypatch):
    groups = {}

    def inspect(self, *args, **kwargs):
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.create_optimizer()
        for group in self.optimizer.param_groups:
            groups.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
        raise KeyboardInterrupt

    monkeypatch.setattr(VirtualWidthTrainer, "train", inspect)
    run = config(tmp_path / "run", text)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    model = build_model(model_config(load_backbone("nano", 257, 32), 4, 10, WidthOptions(mtp=1)), 0)
    spared = no_weight_decay(model)
    assert groups[0.0] == spared
    assert groups[0.1] == {name for name, _ in model.named_parameters()} - spared


def test_head_losses_leave_the_routers_loss_out(tmp_path, text):
    backbone = load_backbone("tiny-moe", 64, 32)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    model = build_model(backbone, 0)
    out = model(ids, labels=ids)
    nll = -out.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert out.loss.item() > nll.item() + 1e-4
    assert head_losses(out, backbone.router_aux_loss_coef).item() == pytest.approx(nll.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "4x10", "2x3-static"])
def test_golden_losses(tmp_path, name):
    """Losses of 20 deterministic steps on made-up tokens; a change that moves them changed the arithmetic.

    In float64: in float32 the processor's own order of sums moves them by more than 1e-5. So it does where AdamW
    divides a gradient by little more than its rounding, as the loss is in float32; hence its ``eps``.
    """
    width, _, static = name.partition("-")
    m, n = (None, None) if width == "plain" else map(int, width.split("x"))
    options = WidthOptions(mtp=1, static=bool(static))
    model = build_model(model_config(load_backbone("nano", 64, 32), m, n, options), 0).double()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(20):
        ids = (torch.rand(4, 32, generator=draw) ** 3 * 64).long()
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], abs=1e-5)
