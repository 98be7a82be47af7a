"""Options for speed and memory do not change what is computed."""

import pytest

from runs import config
from vwn import GeneralizedHyperConnection
from vwn.common.errors import UserError
from vwn.common.files import read_json
from vwn.lab.compare.arms import parse_arm
from vwn.lab.compare.config import CompareConfig
from vwn.training import run as run_module
from vwn.training.checkpoint.manifest import last_checkpoint
from vwn.training.config import SpeedOptions, WidthOptions
from vwn.training.run import train


def test_gradient_accumulation_gives_the_same_losses(tmp_path, text, finished):
    _, whole = finished
    split = train(config(tmp_path / "run", text, optim={"gradient_accumulation": 2}))
    for a, b in zip(split.curve, whole.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


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


def test_gradient_checkpointing_gives_the_same_losses(tmp_path, text, finished):
    _, kept = finished
    recomputed = train(config(tmp_path / "run", text, speed=SpeedOptions(gradient_checkpointing=True)))
    for a, b in zip(recomputed.curve, kept.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def losses(result):
    return [point["loss"] for point in result.curve]


@pytest.mark.parametrize(
    "speed",
    [SpeedOptions(keep_states_every=3), SpeedOptions(connection_backend="reference"), SpeedOptions(compile=True)],
    ids=["keep-states-every", "reference", "compile"],
)
def test_speed_options_give_the_same_losses(tmp_path, text, finished, speed):
    _, usual = finished
    assert losses(train(config(tmp_path / "run", text, speed=speed))) == pytest.approx(losses(usual), abs=1e-5)


def test_speed_options_reach_the_model(tmp_path, text, monkeypatch):
    seen = []
    apply = run_module.apply_speed
    monkeypatch.setattr(run_module, "apply_speed", lambda model, *a, **k: (apply(model, *a, **k), seen.append(model)))
    speed = SpeedOptions(connection_backend="reference", keep_states_every=3, loss_backend="torch")
    train(config(tmp_path / "run", text, speed=speed, optim={"steps": 2}))
    (model,) = seen
    backends = {m.backend for m in model.modules() if isinstance(m, GeneralizedHyperConnection)}
    assert (backends, model.model.keep_states_every, model.loss_backend) == ({"reference"}, 3, "torch")


DOUBLY = WidthOptions(carry_constraint="doubly_stochastic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(speed=SpeedOptions(keep_states_every=0)), "keep-states-every must be at least 1, got 0"),
        (dict(speed=SpeedOptions(keep_states_every=2, compile=True)), "does not go with --compile"),
        (dict(speed=SpeedOptions(keep_states_every=2, gradient_checkpointing=True)), "with --gradient-checkpointing"),
        (dict(speed=SpeedOptions(connection_backend="cuda")), "backend must be one of auto, reference, compiled"),
        (dict(m=None, n=None, speed=SpeedOptions(connection_backend="reference")), "need a virtual width"),
        (dict(m=None, n=None, width=WidthOptions(), speed=SpeedOptions(loss_backend="liger")), "or --mtp"),
        (dict(width=WidthOptions(connection="hc"), speed=SpeedOptions(connection_backend="compiled")), "connection hc"),
        (dict(width=DOUBLY, speed=SpeedOptions(connection_backend="triton")), "ghc with a constrained carry"),
        (dict(width=DOUBLY, speed=SpeedOptions(keep_states_every=2)), "a free carry"),
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
