"""Runs of several gloo processes: the losses of one process, resumed after kills and on another number of processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import vwn.hf  # noqa: F401
from conftest import perturb
from processes import Processes, free_port, train_run, trained
from runs import command, config
from vwn.cli import main, run_train
from vwn.common.errors import UserError
from vwn.common.processes import rank
from vwn.training import run as run_module
from vwn.training.checkpoint.saving import MODEL
from vwn.training.config import CorpusConfig, ReliabilityOptions, SpeedOptions
from vwn.training.distributed import parallel_mode
from vwn.training.run import train
from vwn.training.trainer import VirtualWidthTrainer
from vwn.training.watch.samples import SampleLog

STEPS = 3


def small(out, text, **changes):
    """MTP, gradient accumulation, samples of two tokens, and a checkpoint after two of three steps."""
    corpus = CorpusConfig(data=str(text), window=32, max_valid_tokens=2048)
    optim = {"steps": STEPS, "batch_size": 8, "gradient_accumulation": 2, "learning_rate": 3e-3}
    return config(out, text, corpus=corpus, optim=optim, **dict(log_every=1, eval_every=2, save_every=2) | changes)


def perturbed_train(run, *, check=True):
    """Train from perturbed weights, and see to it that the model is sharded, or that it is not."""
    build = run_module.build_model
    run_module.build_model = lambda *args: perturb(build(*args), scale=0.02)
    step, kinds = VirtualWidthTrainer.training_step, set()

    def watched(self, *args, **kwargs):
        # embedding and head may stay gathered between passes
        kinds.update(isinstance(p, DTensor) for name, p in self.model.named_parameters() if ".layers." in name)
        return step(self, *args, **kwargs)

    VirtualWidthTrainer.training_step = watched
    try:
        train(run)
    finally:
        run_module.build_model, VirtualWidthTrainer.training_step = build, step
    if check:
        assert kinds == {run.parallel == "fsdp2"}


def run_on(run, log, world):
    with Processes(perturbed_train, run, world=world, log=log) as processes:
        assert processes.wait() == [0] * world, processes.said()


def log_of(out: Path) -> list[dict]:
    """Everything the run logged but what depends on the clock."""
    last = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("seconds", "runtime", "_per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in history]


def assert_same_run(out, reference, atol=1e-5):
    logged, expected = log_of(out), log_of(reference)
    assert [e.keys() for e in logged] == [e.keys() for e in expected]
    assert len(logged) >= 4
    for one, other in zip(logged, expected, strict=True):
        for key, value in other.items():
            assert one[key] == pytest.approx(value, abs=atol, rel=atol), (key, one["step"])
    weights, wanted = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    """One process, the reference."""
    out = tmp_path_factory.mktemp("alone") / "run"
    perturbed_train(small(out, text))
    return out


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def pair(request, tmp_path_factory, text):
    """Two processes, from start to end."""
    folder = tmp_path_factory.mktemp(request.param)
    run_on(small(folder / "run", text, parallel=request.param), folder / "log", 2)
    return request.param, folder / "run"


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(pair, alone):
    assert_same_run(pair[1], alone)
    for out in (pair[1], alone):
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 3]


def train_where_a_sample_fails(run):
    generate = SampleLog._generate
    SampleLog._generate = lambda self: 1 / 0 if rank() else generate(self)
    train(run)


@pytest.mark.slow
def test_a_sample_that_fails_in_one_process_of_a_sharded_run_ends_all(tmp_path, text):
    run = small(tmp_path / "run", text, parallel="fsdp2")
    with Processes(train_where_a_sample_fails, run, log=tmp_path / "log") as processes:
        assert processes.wait(60) == [1, 1]
        assert "a sample failed (ZeroDivisionError: division by zero); use --sample-tokens 0" in processes.said()


@pytest.mark.slow
def test_whole_weights_are_left_that_plain_transformers_loads(pair, alone):
    _, out = pair
    ids = torch.arange(3, 40)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, alone))
    torch.testing.assert_close(one(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)
    assert one.config.architectures == ["VirtualWidthForCausalLM"]
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}


def cut(out: Path, to: Path) -> Path:
    """A copy of a run as a kill after its first checkpoint would have left it."""
    shutil.copytree(out, to)
    for path in [*to.glob("checkpoint-3"), *to.glob("*.json"), *to.glob("*.safetensors")]:
        if path.name == "checkpoint-3":
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
    return to


@pytest.mark.slow
def test_a_run_of_two_resumes_on_one_with_copies_alone(pair, alone, tmp_path, text, capsys):
    out = cut(pair[1], tmp_path / "run")
    assert (out / "checkpoint-2" / MODEL).is_dir() == (pair[0] == "fsdp2")
    run = small(out, text, resume=True)
    if pair[0] == "fsdp2":
        with pytest.raises(UserError, match="checkpoint-2 is of a run with --parallel fsdp2"):
            train(run)
        return
    perturbed_train(run, check=False)
    assert "was written by 2 processes, 1 go on with it" in capsys.readouterr().err
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_run_of_one_resumes_on_two(alone, tmp_path, text):
    out = cut(alone, tmp_path / "run")
    run_on(small(out, text, parallel="ddp", resume=True), tmp_path / "log", 2)
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_killed_and_resumed_sharded_run_goes_on_as_if_nothing_had_been(alone, tmp_path, text):
    run = small(tmp_path / "run", text, parallel="fsdp2")
    again = SpeedOptions(gradient_checkpointing=True)  # gathers the layers' weights a second time, for the same losses
    run = replace(run, speed=again)
    with Processes(perturbed_train, run, log=tmp_path / "first") as processes:
        deadline = time.monotonic() + 120
        while not (run.out / "checkpoint-2").exists():
            assert all(p.is_alive() for p in processes.all), processes.said()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(processes.all[0].pid, signal.SIGKILL)
        processes.all[1].join(60)
        assert "another process of this run is gone" in processes.said()
    assert not (run.out / "result.json").exists()
    run_on(replace(run, resume=True), tmp_path / "second", 2)
    assert_same_run(run.out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["fsdp2"], indirect=True)
def test_a_run_of_two_that_only_lacks_its_end_gets_it(pair, tmp_path, text):
    out = cut(pair[1], tmp_path / "run")
    shutil.copytree(pair[1] / "checkpoint-3", out / "checkpoint-3")
    trained(small(out, text, parallel=pair[0], resume=True), tmp_path / "log")
    one, other = load_file(out / "model.safetensors"), load_file(pair[1] / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    ends = [json.loads((folder / "result.json").read_text())["curve"][-1] for folder in (out, pair[1])]
    assert ends[0] == ends[1]


def poisoned(run):
    """The loss of step 2 is not finite in the second process alone."""
    compute = VirtualWidthTrainer.compute_loss

    def poison(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        bad = torch.distributed.get_rank() == 1 and self.state.global_step == 1 and model.training
        return loss * float("nan") if bad else loss

    VirtualWidthTrainer.compute_loss = poison
    try:
        train(run)
    except UserError as stopped:
        print("stopped:", stopped)
        sys.exit(3)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path, text):
    run = small(tmp_path / "run", text, reliability=ReliabilityOptions(skip_bad_steps=0))
    with Processes(poisoned, run, log=tmp_path / "log") as processes:
        assert processes.wait() == [3, 3], processes.said()
        assert processes.said().count("stopped: the loss is no longer finite at step 2") == 2
    assert not (run.out / "result.json").exists()


@pytest.mark.slow
def test_sharding_that_does_not_come_about_is_refused(tmp_path, text):
    """accelerate copies on a CPU, without a word, what it was to shard."""
    run = small(tmp_path / "run", text, parallel="fsdp2")
    with Processes(train_run, run, log=tmp_path / "log", shim=False) as processes:
        assert all(processes.wait()), processes.said()
        assert "accelerate has left" in processes.said()
    assert not list(run.out.glob("checkpoint-*"))


@pytest.mark.slow
def test_torchrun_speaks_with_one_voice(tmp_path, text):
    """As a user would type it; without the dashes torchrun takes --m for an option of its own."""
    run = config(tmp_path, text)
    (run.out / "thesis.txt").write_text("mine")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*torchrun, "-m", "--", *command(run)[2:]],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode
    assert done.stderr.count("exists already") == 1
    assert "exitcode  : 2" in done.stderr


def test_only_the_first_process_says_how_a_run_ended(finished, monkeypatch, capsys):
    run, result = finished
    monkeypatch.setattr(run_module, "train", lambda config: result)
    for number, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", number)
        run_train(run)
        assert capsys.readouterr().out.count("validation loss") == said


@pytest.fixture
def processes_of(monkeypatch):
    def launched(world, **environment):
        for module in ("training.distributed", "common.processes"):
            monkeypatch.setattr(f"vwn.{module}.world_size", lambda: world)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launched


def test_what_is_asked_for_and_what_accelerate_says_decide(processes_of, text, tmp_path):
    run = small(tmp_path, text)
    assert parallel_mode(run) == "none"
    processes_of(2)
    assert parallel_mode(run) == "ddp"
    assert parallel_mode(replace(run, parallel="fsdp2")) == "fsdp2"
    processes_of(4, ACCELERATE_USE_FSDP="true")
    assert parallel_mode(run) == "fsdp2"


@pytest.mark.parametrize(
    ("world", "changes", "environment", "sentence"),
    [
        (1, {"parallel": "fsdp2"}, {}, "need several processes and there is one"),
        (3, {}, {}, "make it a multiple of 6"),
        (2, {"parallel": "ddp"}, {"ACCELERATE_USE_FSDP": "true"}, "drop --parallel ddp"),
        (2, {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (2, {"parallel": "fsdp2", "speed": SpeedOptions(compile=True)}, {}, "--compile does not go with"),
        (2, {"parallel": "fsdp2", "speed": SpeedOptions(keep_states_every=2)}, {}, "--keep-states-every does not go"),
        (2, {"parallel": "fsdp2", "speed": SpeedOptions(loss_backend="liger")}, {}, "--loss-backend liger does not"),
    ],
)
def test_what_does_not_go_together_is_refused(processes_of, text, tmp_path, world, changes, environment, sentence):
    processes_of(world, **environment)
    with pytest.raises(UserError, match=sentence):
        parallel_mode(small(tmp_path, text, **changes))


@pytest.mark.parametrize("arguments", [["compare", "--out", "x"], ["cost"]])
def test_commands_of_one_process_refuse_a_launcher(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["vwn", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "only vwn train works in several" in capsys.readouterr().err
