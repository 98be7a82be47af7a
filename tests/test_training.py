"""Training end to end on a small text: what a run leaves behind, resuming, pairing of arms, golden losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from vwn import no_weight_decay
from vwn.errors import UserError
from vwn.training.config import CorpusConfig, OptimConfig, TrainConfig, WidthOptions
from vwn.training.directory import last_checkpoint, locked, read_json
from vwn.training.model import build_model, load_backbone, model_config
from vwn.training.run import load_corpus, train
from vwn.training.trainer import Diverged, VirtualWidthTrainer, head_losses

GOLDEN = Path(__file__).parent / "golden_losses.json"


def config(out, text, m=4, n=10, **changes):
    optim = dict(steps=20, batch_size=4, learning_rate=1e-2) | changes.pop("optim", {})
    options = dict(
        out=Path(out),
        backbone="nano",
        m=m,
        n=n,
        corpus=CorpusConfig(data=str(text), window=32, max_valid_tokens=512),
        width=WidthOptions(mtp=1),
        optim=OptimConfig(**optim),
        log_every=2,
        eval_every=4,
        save_every=4,
    )
    return TrainConfig(**options | changes)


def command(config, *more):
    c, o = config.corpus, config.optim
    return [
        sys.executable, "-m", "vwn", "train", "--out", str(config.out), "--data", c.data, "--window", str(c.window),
        "--max-valid-tokens", str(c.max_valid_tokens), "--backbone", config.backbone, "--m", str(config.m),
        "--n", str(config.n), "--mtp", str(config.width.mtp), "--steps", str(o.steps), "--batch-size",
        str(o.batch_size), "--learning-rate", str(o.learning_rate), "--log-every", str(config.log_every),
        "--eval-every", str(config.eval_every), "--save-every", str(config.save_every), *more,
    ]  # fmt: skip


def without_seconds(curve):
    return [{k: v for k, v in point.items() if k != "seconds"} for point in curve]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    run = config(tmp_path_factory.mktemp("run") / "out", text)
    return run, train(run)


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
    model = AutoModelForCausalLM.from_pretrained(run.out)
    assert sum(p.numel() for p in model.parameters()) == result.params


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
    picked = [corpus.valid[i * len(corpus.valid) // 16]["input_ids"] for i in range(16)]
    ids = torch.stack(picked)
    with torch.no_grad():
        out = model(ids, labels=ids, output_mtp_logits=True)
    nll = -out.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    nll_2 = -out.mtp_logits[0].log_softmax(-1)[:, :-2].gather(-1, ids[:, 2:, None]).mean().item()
    assert result.curve[-1]["loss"] == pytest.approx(nll, abs=1e-5)
    assert result.curve[-1]["loss_2"] == pytest.approx(nll_2, abs=1e-5)


def test_final_validation_also_when_the_interval_does_not_divide_the_steps(tmp_path, text):
    result = train(config(tmp_path / "run", text, optim={"steps": 7}, eval_every=4, save_every=100))
    assert [p["tokens"] // 128 for p in result.curve] == [0, 4, 7]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-7"


def test_an_existing_directory_is_refused_and_left_alone(finished, text):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.out.rglob("*")}
    with pytest.raises(UserError, match=r"exists already.*--resume"):
        train(config(run.out, text))
    assert {p: p.stat().st_mtime_ns for p in run.out.rglob("*")} == before


def test_resuming_a_finished_run_returns_its_result(finished, text):
    run, result = finished
    assert train(config(run.out, text, resume=True)) == result


def test_resuming_with_another_setting_is_refused(finished, text):
    run, _ = finished
    with pytest.raises(UserError, match=r"optim.steps = 20, not 30"):
        train(config(run.out, text, optim={"steps": 30}, resume=True))


def test_kill_and_resume_gives_the_same_run_bit_for_bit(tmp_path, finished, text):
    reference, result = finished
    run = config(tmp_path / "run", text)
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for moment in ("checkpoint-4", "checkpoint-12"):
        more = ["--resume"] if run.out.exists() else []
        process = subprocess.Popen(command(run, *more), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (run.out / moment).exists():
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # what a kill in the middle of a save leaves
    rest = run.out / ".incomplete" / "checkpoint-99"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"half")
    (run.out / ".discarded-checkpoint-4").mkdir(exist_ok=True)
    subprocess.run([*command(run), "--resume"], env=env, check=True, capture_output=True)

    resumed = json.loads((run.out / "result.json").read_text())
    assert without_seconds(resumed["curve"]) == without_seconds(result.curve)
    one, other = load_file(run.out / "model.safetensors"), load_file(reference.out / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    seconds = [p["seconds"] for p in resumed["curve"]]
    assert seconds == sorted(seconds)
    assert not (run.out / ".incomplete").exists()
    assert not list(run.out.glob(".discarded-*"))


def test_a_save_that_fails_leaves_no_checkpoint_behind(tmp_path, text, monkeypatch):
    def full_disk(self, directory):
        if "checkpoint-8" in directory:
            raise OSError("No space left on device")

    monkeypatch.setattr(VirtualWidthTrainer, "_save_rng_state", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(config(tmp_path / "run", text))
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_only_the_last_two_checkpoints_are_kept(finished):
    run, _ = finished
    assert sorted(p.name for p in run.out.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-20"]


def test_a_non_finite_loss_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path, text, monkeypatch):
    compute = VirtualWidthTrainer.compute_loss
    steps = []

    def poisoned(self, model, inputs, return_outputs=False, **kwargs):
        steps.append(None)
        if len(steps) == 7:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
        return compute(self, model, inputs, return_outputs, **kwargs)

    monkeypatch.setattr(VirtualWidthTrainer, "compute_loss", poisoned)
    message = r"loss is no longer finite at step 7; the last checkpoint is .*checkpoint-4.*--learning-rate"
    with pytest.raises(Diverged, match=message) as stopped:
        train(config(tmp_path / "run", text))
    weights = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    curve = stopped.value.result.curve
    assert [p["tokens"] // 128 for p in curve] == [0, 4, 7]
    assert curve[-1]["loss"] is None


def test_ruined_weights_are_neither_saved_nor_called_a_result(tmp_path, text):
    for name, save_every in (("late", 4), ("early", 1)):
        run = config(tmp_path / name, text, optim={"steps": 4, "learning_rate": 1e30}, save_every=save_every)
        with pytest.raises(Diverged, match="no longer finite"):
            train(run)
        assert not (run.out / "result.json").exists()
        assert not (run.out / "config.json").exists()
        for checkpoint in run.out.glob("checkpoint-*"):
            assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("gone", [["result.json"], ["result.json", "config.json", "model.safetensors"]])
def test_a_run_killed_after_its_last_step_only_writes_its_result(tmp_path, text, finished, gone):
    reference, result = finished
    out = tmp_path / "run"
    shutil.copytree(reference.out, out)
    for name in gone:
        (out / name).unlink()
    again = train(config(out, text, resume=True))
    assert again.curve == result.curve
    assert again.tokens_per_second == pytest.approx(result.tokens_per_second, rel=0.01)
    one, other = load_file(out / "model.safetensors"), load_file(reference.out / "model.safetensors")
    assert all(torch.equal(one[k], other[k]) for k in other)
    assert last_checkpoint(out).name == "checkpoint-20"
    assert AutoModelForCausalLM.from_pretrained(out).config.m == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, finished, capsys, name):
    reference, _ = finished
    shutil.copytree(reference.out, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-20" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-16"
    assert "checkpoint-20 is damaged" in capsys.readouterr().err


def test_changed_text_is_refused(tmp_path, text):
    copy = tmp_path / "text.txt"
    copy.write_text(text.read_text())
    run = config(tmp_path / "run", copy, optim={"steps": 4})
    train(run)
    (run.out / "result.json").unlink()
    copy.write_text(text.read_text()[:-500])
    with pytest.raises(UserError, match="not those that the run"):
        train(config(tmp_path / "run", copy, optim={"steps": 4}, resume=True))


def test_other_peoples_directories_are_left_alone(tmp_path, text):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        train(config(tmp_path / "thesis", text, resume=True))
    with pytest.raises(UserError, match="is a file"):
        train(config(tmp_path / "file", text))
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_directory(tmp_path, text):
    run = config(tmp_path / "run", text)
    with locked(run.out), pytest.raises(UserError, match="another process"):
        train(run)


def test_records_that_are_no_records(tmp_path, finished, text):
    reference, _ = finished
    for number, (name, content) in enumerate(
        (n, c) for n in ("run.json", "result.json") for c in ("", "[]", '{"name": 1}')
    ):
        out = tmp_path / str(number)
        shutil.copytree(reference.out, out, ignore=shutil.ignore_patterns("checkpoint-*"))
        (out / name).write_text(content)
        with pytest.raises(UserError, match=r"run\.json|result\.json|was started with"):
            train(config(out, text, resume=True))


def test_logs_do_not_depend_on_where_a_run_was_interrupted(tmp_path, text):
    """Also where the interval of saves is no multiple of that of logs."""
    options = dict(log_every=3, save_every=4, eval_every=100, optim={"steps": 8})
    train(config(tmp_path / "whole", text, **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for rest in ("result.json", "config.json", "model.safetensors"):
        (tmp_path / "cut" / rest).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    train(config(tmp_path / "cut", text, **options, resume=True))
    histories = [
        [(h["step"], h["loss"]) for h in read_json(last_checkpoint(tmp_path / d) / "trainer_state.json")["log_history"]
         if "loss" in h]
        for d in ("whole", "cut")
    ]  # fmt: skip
    assert histories[0] == histories[1]


def test_plain_without_mtp_is_a_stock_model(tmp_path, text):
    result = train(config(tmp_path / "run", text, m=None, n=None, width=WidthOptions(), optim={"steps": 4}))
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


def test_data_order_depends_on_the_seed_alone(tmp_path, text, monkeypatch):
    def batches(name, m, n, seed):
        seen = []
        compute = VirtualWidthTrainer.compute_loss

        def recording(self, model, inputs, return_outputs=False, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return compute(self, model, inputs, return_outputs, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(VirtualWidthTrainer, "compute_loss", recording)
            train(config(tmp_path / name, text, m, n, seed=seed, optim={"steps": 5}))
        return torch.stack(seen)

    plain, wide, other = batches("a", None, None, 0), batches("b", 4, 8, 0), batches("c", 4, 8, 1)
    assert torch.equal(plain, wide)
    assert not torch.equal(wide, other)
    assert len(plain.flatten(0, 1).unique(dim=0)) == 20  # no window twice within a pass


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
    recomputed = train(config(tmp_path / "run", text, gradient_checkpointing=True))
    for a, b in zip(recomputed.curve, kept.curve, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_experts_train(tmp_path, text):
    result = train(config(tmp_path / "run", text, backbone="tiny-moe", optim={"steps": 6, "learning_rate": 3e-3}))
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]


@pytest.mark.parametrize("name", ["plain", "4x10", "2x3-static"])
def test_golden_losses(tmp_path, name):
    """Losses of 20 deterministic steps on made-up tokens; a change that moves them changed the arithmetic."""
    width, _, static = name.partition("-")
    m, n = (None, None) if width == "plain" else map(int, width.split("x"))
    options = WidthOptions(mtp=1, static=bool(static))
    model = build_model(model_config(load_backbone("nano", 64, 32), m, n, options), 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(20):
        ids = (torch.rand(4, 32, generator=draw) ** 3 * 64).long()
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    golden = json.loads(GOLDEN.read_text())[name]
    assert losses == pytest.approx(golden, abs=1e-5)
