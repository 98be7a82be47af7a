"""Steps that are skipped: exactly, boundedly, recorded, and the same after a resume."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from runs import config, without_seconds
from vwn.training.checkpoint.manifest import checkpoints, last_checkpoint
from vwn.training.config import ReliabilityOptions, SpeedOptions
from vwn.training.run import train
from vwn.training.trainer import Diverged, VirtualWidthTrainer
from vwn.training.watch.guards import HISTORY, StepGuard

pytestmark = pytest.mark.slow


def run(out, text, **options):
    reliability = ReliabilityOptions(**options.pop("reliability", {}))
    made = config(
        out, text, m=2, n=3, optim={"steps": options.pop("steps", 8)}, speed=SpeedOptions("reference"), **options
    )
    return dataclasses.replace(made, reliability=reliability)


def spoil(monkeypatch, steps, what="gradient") -> list[dict[str, torch.Tensor]]:
    """Make the losses, the gradients, or what both are of, bad in these steps; the weights before each step."""
    original, weights = VirtualWidthTrainer.training_step, []

    def bad(self, model, inputs, *args, **kwargs):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 in steps:
            if what == "gradient":
                next(p for p in model.parameters() if p.grad is not None).grad[..., 0] = float("inf")
            elif what == "loss":
                loss = loss * float("nan")
                self.step_losses[-1] = loss
            else:
                loss = loss + 100.0
                self.step_losses[-1] = loss
        return loss

    monkeypatch.setattr(VirtualWidthTrainer, "training_step", bad)
    return weights


def history(out):
    state = json.loads((last_checkpoint(out) / "trainer_state.json").read_text())
    return [(e["step"], e["loss"], e["objective"], e["loss_2"]) for e in state["log_history"] if "loss" in e]


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_bad_step_leaves_weights_and_moments_alone_and_is_recorded(tmp_path, text, monkeypatch, capsys, what):
    weights = spoil(monkeypatch, {5}, what)
    train(run(tmp_path / "run", text))
    before, after = weights[4], weights[5]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(weights[5][name], weights[6][name]) for name in before)
    moments = torch.load(last_checkpoint(tmp_path / "run") / "optimizer.pt", weights_only=True)["state"]
    assert {float(state["step"]) for state in moments.values()} == {7.0}
    said = capsys.readouterr().err
    assert f"step 5 is skipped: the {what} is no longer finite (1 of at most 3 in 100 steps" in said
    entry = json.loads((tmp_path / "run" / "skipped" / "step-5.json").read_text())
    assert entry["step"] == 5
    assert entry["loss" if what == "loss" else "gradient_norm"] is None  # strict JSON has no such numbers
    assert load_file(tmp_path / "run" / "skipped" / "step-5-rank0.safetensors")["input_ids_0"].shape == (4, 32)
    for _, loss, objective, second in history(tmp_path / "run"):  # of the same steps, the skipped one left out
        assert objective == pytest.approx(loss + 0.3 * second, rel=1e-5)


def test_the_log_is_the_mean_of_the_steps_that_were_used(tmp_path, text, monkeypatch):
    spoil(monkeypatch, {5}, "high")
    options = dict(save_every=8, eval_every=8, steps=6)
    train(run(tmp_path / "one", text, reliability={"spike_factor": 0.0}, log_every=1, **options))
    single = {step: objective for step, _, objective, _ in history(tmp_path / "one")}
    monkeypatch.setattr(StepGuard, "verdict", lambda self, loss, norm: "high" if loss > 50 else None)
    train(run(tmp_path / "three", text, log_every=3, **options))
    for step, loss, objective, _ in history(tmp_path / "three"):
        assert loss < 10, step
        assert objective < 20, step
    assert single[5] > 50  # what would have been logged
    assert history(tmp_path / "three")[0][2] == pytest.approx(sum(single[k] for k in (1, 2, 3)) / 3, rel=1e-5)


def test_too_many_bad_steps_end_the_run_with_the_last_good_state(tmp_path, text, monkeypatch):
    spoil(monkeypatch, {5, 6, 7, 8, 9})
    with pytest.raises(Diverged, match=r"gradient is no longer finite, after the bad steps \[5, 6\] at step 7; .*-4;"):
        train(run(tmp_path / "run", text, reliability={"skip_bad_steps": 2}))
    assert [path.name for path in checkpoints(tmp_path / "run").values()] == ["checkpoint-4"]
    with pytest.raises(Diverged, match="at step 5"):
        train(run(tmp_path / "other", text, reliability={"skip_bad_steps": 0}))


def test_guards_and_logs_go_on_after_a_resume_as_if_never_interrupted(tmp_path, text, monkeypatch):
    spoil(monkeypatch, {3, 4, 7})
    options = dict(log_every=3)
    result = train(run(tmp_path / "whole", text, **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for rest in ("result.json", "config.json", "model.safetensors"):
        (tmp_path / "cut" / rest).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    again = train(run(tmp_path / "cut", text, resume=True, **options))
    assert without_seconds(again.curve) == without_seconds(result.curve)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    states = [json.loads((tmp_path / d / "checkpoint-8/run_state.json").read_text())["guard"] for d in ("whole", "cut")]
    assert states[0] == states[1]
    assert states[0][0]["skipped"] == [3, 4, 7]


def test_spikes_are_measured_by_robust_deviations() -> None:
    guard = StepGuard(None, 3, 6.0)
    draw = torch.Generator().manual_seed(0)
    values = (3 + 0.1 * torch.randn(HISTORY, generator=draw)).tolist()
    guard.history.extend([v, v / 3] for v in values[: HISTORY // 2 - 1])
    assert guard.verdict(30.0, 1.0) is None  # too little is known
    guard.history.extend([v, v / 3] for v in values[HISTORY // 2 - 1 :])
    assert guard.verdict(3.3, 1.1) is None
    assert "loss of 5" in guard.verdict(5.0, 1.0)
    assert "gradient norm of 3" in guard.verdict(3.0, 3.0)
    assert "the loss is" in guard.verdict(float("inf"), 1.0)
    guard.history.extend([100.0, 50.0] for _ in range(10))  # a few outliers do not move it
    assert "loss of 5" in guard.verdict(5.0, 1.0)
    assert StepGuard(None, 3, 0.0).verdict(1e9, 1e9) is None
    states = [guard.state_dict()]
    other = StepGuard(None, 3, 6.0)
    other.load_state_dict(json.loads(json.dumps(states)))
    assert other.verdict(5.0, 1.0) == guard.verdict(5.0, 1.0)
