"""The health log: what it measures of gradients, state and routing, and that training does not notice it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from runs import config, without_seconds
from tiny import build, token_ids, vwn_config
from vwn.nn.groups import default_factors
from vwn.training.checkpoint.manifest import last_checkpoint
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.run import rate_factors, train
from vwn.training.watch.health import concerns, effective_slots, gradient_norms, measure_state
from vwn.training.watch.lines import StepLines


def read_health(directory):
    return StepLines(directory / "health.jsonl").read()


def test_a_run_measures_at_its_first_and_last_step_and_between(finished):
    run, _ = finished
    health = read_health(run.out)
    assert [h["step"] for h in health] == [1, 4, 8, 12, 16, 20]
    for h in health:
        assert h["tokens"] == h["step"] * 4 * 32
        assert len(h["gradient_norm"]["layers"]) == len(h["gradient_norm"]["routing"]) == 4
        assert len(h["state"]["rms"]) == 1 + len(h["state"]["name"]) == 9
    assert health[0]["state"]["spectral_radius"] == pytest.approx([1.0] * 8, abs=0.1)
    assert health[-1]["state"]["spectral_radius"] != health[0]["state"]["spectral_radius"]


def test_the_worst_is_in_the_logs_with_the_step_it_was_measured_at(finished):
    run, _ = finished
    history = json.loads((last_checkpoint(run.out) / "trainer_state.json").read_text())["log_history"]
    logged = {h["step"]: h for h in history if "health_state_rms_max" in h}
    health = {h["step"]: h for h in read_health(run.out)}
    assert sorted(logged) == [2, 4, 8, 12, 16, 20]  # the first step's waits for the first log
    for step in (4, 20):
        assert logged[step]["health_state_rms_max"] == max(health[step]["state"]["rms"])
        assert logged[step]["health_layer_grad_norm_max"] == max(health[step]["gradient_norm"]["layers"])
        assert logged[step]["health_effective_slots_min"] == min(health[step]["state"]["effective_slots"])
        # the Trainer's own norm of all gradients, before clipping
        assert health[step]["gradient_norm"]["total"] == pytest.approx(logged[step]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_training_does_not_notice_it(tmp_path, text):
    without, measured = (
        train(config(tmp_path / str(every), text, health_every=every, optim={"steps": 3})) for every in (0, 1)
    )
    assert without_seconds(without.curve) == without_seconds(measured.curve)
    assert not (tmp_path / "0" / "health.jsonl").exists()


def test_gradient_norms_cover_every_parameter_once():
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    norms = gradient_norms(model)
    flat = [
        v for name, value in norms.items() if name != "total" for v in (value if isinstance(value, list) else [value])
    ]
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert norms["total"] == pytest.approx(float(grads.norm()), rel=1e-5)
    assert math.fsum(v * v for v in flat) == pytest.approx(norms["total"] ** 2, rel=1e-6)
    ours = [p.grad for n, p in model.named_parameters() if "backbone.layers.1.connections" in n]
    assert norms["routing"][1] == pytest.approx(float(torch.cat([g.flatten() for g in ours]).norm()), rel=1e-5)
    mtp = [p.grad for n, p in model.named_parameters() if n.startswith("model.mtp")]
    assert norms["mtp"] == pytest.approx(float(torch.cat([g.flatten() for g in mtp]).norm()), rel=1e-5)


def test_the_state_is_the_models_own():
    model = build(vwn_config("llama", 2, 4))
    ids = token_ids()[:1]
    model.train()
    seen = measure_state(model, ids)
    assert model.training
    final = model(ids, output_over_width_state=True).over_width_state.detach()
    assert seen["rms"][-1] == pytest.approx(float(final.square().mean().sqrt()), rel=1e-6)
    first = model.model.embed_tokens(ids).detach()
    assert seen["rms"][0] == pytest.approx(float(first.square().mean().sqrt()), rel=1e-6)
    alpha = model.model.layers[0].connections[0].routing_matrices(first).alpha[..., 2:].detach()
    radius = torch.linalg.eigvals(alpha).abs().amax(-1).mean()
    assert seen["spectral_radius"][0] == pytest.approx(float(radius), rel=1e-5)
    weakest = first.unflatten(-1, (4, -1)).square().mean((0, 1, -1)).sqrt()
    assert seen["weakest_slot"][0] == pytest.approx(float(weakest.min() / weakest.square().mean().sqrt()), rel=1e-5)


def test_saturated_routing_is_seen():
    model = build(vwn_config("llama", 2, 4))
    assert max(measure_state(model, token_ids()[:1])["saturated"]) < 0.9
    with torch.no_grad():
        model.model.layers[1].connections[0].dynamic_alpha.mul_(1e4)
    assert measure_state(model, token_ids()[:1])["saturated"][2] > 0.9


@pytest.mark.parametrize(
    "fields", [{"dynamic": False}, {"carry_constraint": "doubly_stochastic"}, {"connection": "hc"}]
)
def test_other_connections_have_health_too(fields):
    wide = {} if "connection" not in fields else {"embedding": "replicated", "reduce": "sum"}
    seen = measure_state(build(vwn_config("llama", 1 if wide else 2, 4, **fields, **wide)), token_ids()[:1])
    assert all(v is not None and math.isfinite(v) for v in seen["spectral_radius"] + seen["effective_slots"])
    if fields.get("dynamic") is False:
        assert seen["saturated"] == [None] * len(seen["name"])
    if "carry_constraint" in fields:
        assert seen["spectral_radius"] == pytest.approx([1.0] * len(seen["name"]), abs=1e-3)


def test_a_plain_model_has_gradients_and_a_state():
    model = build(vwn_config("llama", 1, 1, connection="residual"))
    plain = AutoModelForCausalLM.from_config(model.config.backbone)
    for either in (model, plain):
        seen = measure_state(either, token_ids()[:1])
        assert len(seen["rms"]) == model.config.num_hidden_layers
        assert seen.keys() == {"rms"}


def test_a_state_that_is_not_finite_is_written_as_unknown(tmp_path):
    model = build(vwn_config("llama", 2, 4))
    with torch.no_grad():
        model.model.layers[1].connections[0].bias_beta.fill_(float("nan"))
    seen = measure_state(model, token_ids()[:1])
    assert seen["spectral_radius"][0] is not None
    assert seen["spectral_radius"][3] is None
    assert math.isnan(seen["rms"][-1])


def test_effective_slots_of_states_with_a_known_number():
    torch.manual_seed(0)
    assert effective_slots(torch.randn(5, 1, 16) * torch.randn(5, 6, 1)) == pytest.approx(1, rel=1e-5)
    two = torch.zeros(5, 6, 16)
    two[:, :3, 0], two[:, 3:, 1] = 1.0, 1.0
    assert effective_slots(two) == pytest.approx(2)
    assert effective_slots(nn.init.orthogonal_(torch.empty(6, 16))[None] * 3) == pytest.approx(6, rel=1e-5)


@pytest.mark.slow
def test_what_goes_wrong_is_said_once(finished, tmp_path, text, caplog):
    run, _ = finished
    healthy = read_health(run.out)[-1]
    assert concerns(healthy) == {}
    assert "routing=0.1" in concerns(healthy | {"state": healthy["state"] | {"rms": [1.0, 1e7]}})["state"]
    still = healthy["state"] | {"rms": [1.0, 1e7], "spectral_radius": [1.0]}  # a carry that is the identity
    assert "carry" not in concerns(healthy | {"state": still})["state"]
    assert concerns(healthy | {"state": {"rms": [1.0, math.nan]}}).keys() == {"state"}
    saturated = healthy | {"state": healthy["state"] | {"saturated": [None, 0.7]}}
    assert "70% of a sublayer" in concerns(saturated)["saturated"]
    assert concerns(healthy | {"gradient_norm": {"total": 0.0}}).keys() == {"gradient"}
    with caplog.at_level("WARNING", logger="vwn"):
        train(config(tmp_path / "run", text, optim={"steps": 3, "learning_rate": 30.0}, health_every=1, eval_every=3))
    assert sum("the state has grown" in r.message for r in caplog.records) == 1


def test_a_factor_that_is_given_is_the_one(tmp_path, text):
    deep = load_backbone("nano", 256, 32).to_dict() | {"num_hidden_layers": 5, "vocab_size": 300}
    (tmp_path / "deep.json").write_text(json.dumps(deep))
    run = config(tmp_path / "run", text, backbone=str(tmp_path / "deep.json"))
    model = build_model(model_config(load_backbone(run.backbone, 257, 32), 4, 10, run.width), 0)
    assert rate_factors(run, model) == {"routing": 0.5, "reduce": 0.1}  # 5 layers; MTP modules do not count
    given = replace(run, optim=replace(run.optim, rate_factors=("routing=1", "table=3")))
    assert rate_factors(given, model) == {"routing": 1.0, "table": 3.0, "reduce": 0.1}
    bound = build(vwn_config("llama", 2, 4, {"num_hidden_layers": 24}, carry_constraint="doubly_stochastic"))
    assert default_factors(bound) == {"reduce": 0.1}
