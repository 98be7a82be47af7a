"""Options for speed and memory do not change what is computed."""

import pytest
import torch

from conftest import perturb
from runs import config
from tiny import build, vwn_config
from vwn import GeneralizedHyperConnection
from vwn.common.errors import UserError
from vwn.common.files import read_json
from vwn.lab.compare.arms import parse_arm
from vwn.lab.compare.config import CompareConfig
from vwn.training import run as run_module
from vwn.training.arguments import apply_speed, training_arguments
from vwn.training.checkpoint.manifest import last_checkpoint
from vwn.training.config import SpeedOptions, WidthOptions
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.run import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backbone", ["nano", "tiny-moe"])
def test_logged_training_losses_do_not_depend_on_accumulation(tmp_path, text, backbone):
    """A stock model's loss is a share of the accumulated batches; what is logged is a mean."""

    def logged(name, parts):
        run = config(tmp_path / name, text, None, None, backbone=backbone, width=WidthOptions(), log_every=1,
                     optim={"steps": 2, "gradient_accumulation": parts})  # fmt: skip
        train(run)
        history = read_json(last_checkpoint(run.out) / "trainer_state.json")["log_history"]
        return [h["loss"] for h in history if "loss" in h]

    assert logged("split", 4) == pytest.approx(logged("whole", 1), abs=2e-3)


def test_the_chunked_loss_is_taken_on_a_cpu_where_it_pays():
    def chosen(compile=False, precision="auto", whole=True, vocab_size=192, modules=1, loss="auto", own=False):
        model = build(vwn_config("llama", 2, 4, {"vocab_size": vocab_size}, num_mtp_modules=modules))
        if own:
            model.loss_function = torch.nn.functional.cross_entropy
        apply_speed(model, SpeedOptions(compile=compile, loss_backend=loss), precision, whole)
        return model.loss_backend

    assert (chosen(), chosen(whole=False)) == ("chunked", "torch")
    for options in ({"compile": True}, {"precision": "bf16"}, {"vocab_size": 191}, {"modules": 0}, {"own": True}):
        assert chosen(**options) == "auto", options
    with pytest.raises(UserError, match="'chunked' needs an unembedding"):
        chosen(loss="chunked", own=True)


def test_speed_options_reach_the_model_and_leave_the_losses(tmp_path, text, monkeypatch):
    seen = []
    apply = run_module.apply_speed
    monkeypatch.setattr(run_module, "apply_speed", lambda model, *a, **k: (apply(model, *a, **k), seen.append(model)))
    speed = SpeedOptions(connection_backend="reference", keep_states_every=3, loss_backend="torch")
    result = train(config(tmp_path / "a", text, speed=speed, optim={"steps": 4, "gradient_accumulation": 2}))
    usual = train(config(tmp_path / "b", text, optim={"steps": 4}))
    model, _ = seen
    backends = {m.backend for m in model.modules() if isinstance(m, GeneralizedHyperConnection)}
    assert (backends, model.model.keep_states_every, model.loss_backend) == ({"reference"}, 3, "torch")
    for a, b in zip(result.curve, usual.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


@pytest.mark.parametrize("width", [(None, None), (4, 10)], ids=["plain", "wide"])
def test_gradient_checkpointing_gives_the_same_gradients(width):
    def gradients(speed):
        model = build_model(model_config(load_backbone("nano", 64, 32), *width, WidthOptions()), 0)
        apply_speed(perturb(model, scale=0.02), speed)
        calls = []
        attention = next(m for name, m in model.named_modules() if name.endswith("layers.1.self_attn"))
        attention.register_forward_hook(lambda *_: calls.append(None))
        ids = torch.arange(32)[None]
        model.train()(ids, labels=ids).loss.backward()
        return len(calls), [p.grad for p in model.parameters()]

    kept, recomputed = gradients(SpeedOptions()), gradients(SpeedOptions(gradient_checkpointing=True))
    assert (kept[0], recomputed[0]) == (1, 2)
    for a, b in zip(kept[1], recomputed[1], strict=True):
        torch.testing.assert_close(a, b)


def test_compiling_reaches_the_trainer(tmp_path, text):
    for compiled in (True, False):
        run = config(tmp_path, text, speed=SpeedOptions(compile=compiled))
        assert training_arguments(run, 0.01, False, {}).torch_compile == compiled


DOUBLY, HYPER = WidthOptions(carry_constraint="doubly_stochastic"), WidthOptions(connection="hc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(speed=SpeedOptions(keep_states_every=0)), "keep-states-every must be at least 1, got 0"),
        (dict(speed=SpeedOptions(keep_states_every=2, compile=True)), "does not go with --compile"),
        (dict(speed=SpeedOptions(keep_states_every=2, gradient_checkpointing=True)), "with --gradient-checkpointing"),
        (dict(speed=SpeedOptions(connection_backend="cuda")), "backend must be one of auto, reference, compiled"),
        (dict(m=None, n=None, speed=SpeedOptions(connection_backend="reference")), "need a virtual width"),
        (dict(m=None, n=None, width=WidthOptions(), speed=SpeedOptions(loss_backend="liger")), "or --mtp"),
        (dict(m=1, n=2, width=HYPER, speed=SpeedOptions(connection_backend="compiled")), "does not run"),
        (dict(width=DOUBLY, speed=SpeedOptions(connection_backend="triton")), "does not run"),
        (dict(width=DOUBLY, speed=SpeedOptions(keep_states_every=2)), "a doubly-stochastic"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message):
        train(config(tmp_path / "run", text, **options))
    assert not (tmp_path / "run").exists()


def test_a_comparison_passes_them_to_the_arms_that_have_a_use_for_them(tmp_path):
    speed = SpeedOptions(connection_backend="reference", keep_states_every=2)
    compare = CompareConfig(out=tmp_path, speed=speed)
    assert compare.run(parse_arm("4x16"), 0).speed == speed
    assert compare.run(parse_arm("plain"), 0).speed == SpeedOptions()
