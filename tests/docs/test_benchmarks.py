"""The benchmarks run and report what they promise; how fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, measure
from benchmarks.rivals import Inputs, check_listing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(tmp_path: Path, name: str, *options: str) -> dict:
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu", "--out", str(out), *options]
    threads = {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    content = json.loads(out.read_text())
    assert content["benchmark"] == name
    assert content["quick"]
    assert content["date"][:2] == "20"
    assert f"python -m benchmarks.{name} --quick --device cpu --out {out}" in content["command"]
    assert content["machine"]["cpu"]
    assert content["machine"]["threads"] == 1
    assert {"vwn", "torch", "triton", "transformers", "hyper-connections", "liger-kernel"} <= content["versions"].keys()
    assert content["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty"} <= content.keys()
    measured = [row for row in content["rows"] if "not measured" not in row]
    assert measured
    for row in measured:
        assert str(row.get("who", row.get("rival", row.get("variant")))) in found.stdout
    for row in content["rows"]:
        if "not measured" in row:
            assert row["not measured"]
            assert not any(key.startswith(("median", "min")) for key in row)
            assert f"not measured: {row['not measured']}" in found.stdout
    return content


def test_connections(tmp_path):
    rows = run(tmp_path, "connections", "--shapes", "2x4")["rows"]
    by_name = {(row["rival"], row["pass"]): row for row in rows if row["rival"] != "copy"}
    rivals = {"ours", "ours, separate", "ours, with the norm", "reference", "listing, eager", "listing, compiled"}
    rivals |= {"ours, identity carry", "plain, eager", "plain, compiled", "hyper-connections", "Liger-Kernel mHC"}
    assert {name for name, _ in by_name} == rivals
    assert "GPU" in by_name["Liger-Kernel mHC", "forward"]["not measured"]
    r, wide, element = 2, 64 * 32, 4
    floors = {"forward": (2 * r + 2) * wide * element, "forward + backward": (5 * r + 5) * wide * element}
    for (name, direction), row in by_name.items():
        if "not measured" in row or direction == "backward":
            continue
        assert 0 < row["min_ms"] <= row["median_ms"]
        if "plain" not in name:
            assert row["floor_bytes"] == floors[direction]


def test_training_step(tmp_path):
    rows = run(tmp_path, "training_step", "--shapes", "2x3")["rows"]
    assert {row["family"] for row in rows} == {"dense", "moe"}
    variants = {"auto", "identity carry", "reference", "keep_states_every=4", "all logits", "checkpointing"}
    assert {row["variant"] for row in rows if row["family"] == "dense"} == variants
    assert all(row["saved_mb"] < row["total_peak_mb"] for row in rows)
    saved = {row["variant"]: row["saved_mb"] for row in rows if row["family"] == "dense"}
    assert saved["checkpointing"] < saved["keep_states_every=4"] < saved["auto"] == saved["reference"]


def test_memory(tmp_path):
    rows = run(tmp_path, "memory", "--shapes", "2x3")["rows"]
    chain = {(row["who"], row["keep_states_every"]): row for row in rows if row["where"] == "chain"}
    bound = (3 / 2 + 1) * 64 * 4
    for who in ("reference", "compiled"):
        for keep in (1, 4):
            if "not measured" not in chain[who, keep]:
                assert chain[who, keep]["saved_bytes"] == (3 / 2 / keep + 1) * 64 * 4
    assert chain["listing", 1]["saved_bytes"] > 2 * bound
    loss = {row["who"]: row for row in rows if row["where"] == "loss"}
    assert loss["torch"]["peak_bytes"] > loss["torch"]["heads"] * loss["torch"]["logits_bytes"] == 2 * 512 * 4
    assert loss["chunked"]["loss"] == pytest.approx(loss["torch"]["loss"], abs=1e-4)
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert loss["liger"]["loss"] == pytest.approx(loss["torch"]["loss"], abs=1e-4)
        assert loss["torch"]["peak_bytes"] - loss["liger"]["peak_bytes"] > loss["torch"]["logits_bytes"]


def test_rivals_take_turns():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = measure.take_turns(calls, CPU, rounds=3, warmup=0, sample_seconds=0.0)
    assert "".join(seen) == "ab" + 3 * "aabb"  # each sample after a call that is not timed
    assert all(0 < t.best <= t.median for t in times.values())


def test_memory_counts_what_stays_and_the_most_there_was():
    def call() -> torch.Tensor:
        large = torch.empty(1000)
        small = torch.empty(10)
        del large
        return small

    result, memory = measure.memory_of(call, CPU)
    assert result.nbytes == 40
    assert memory.live == pytest.approx(40, abs=64)
    assert memory.peak == pytest.approx(4040, abs=64)


def test_listing_that_differs_is_noticed():
    inputs = Inputs(2, 3, 8, 5, torch.float32, CPU)
    check_listing(inputs, inputs.connection(torch.float32))
    for field in inputs.weights._fields[:-1]:
        changed = inputs.connection(torch.float32)
        with torch.no_grad():
            getattr(changed, field).add_(0.1)
        with pytest.raises(AssertionError, match="listing"):
            check_listing(inputs, changed)


# All that wants a GPU


def test_gpu_steps_within_a_time_limit(tmp_path):
    """Each is asked for what the options say; one that fails or takes too long does not keep others from running."""
    options = gpu._parser().parse_args(
        ["--shapes", "2x3", "--folder", str(tmp_path), "--commit", "abc", "--data", "books"]
    )
    commands, limits = {}, {}

    def run(command, environment, seconds):
        name = gpu.STEPS[len(commands)].name
        commands[name], limits[name] = (command, environment), seconds
        return {"accuracy": 3, "memory": None}.get(name, 0)

    lines = dict(line.split(": ") for line in gpu.run_all(list(gpu.STEPS), options, run))
    assert list(lines) == [step.name for step in gpu.STEPS]
    assert lines.pop("accuracy") == "failed, exit code 3"
    assert lines.pop("memory").startswith("stopped")
    assert set(lines.values()) == {"done"}
    assert limits["connections"] == pytest.approx(0.3 * 9 * 60)
    assert commands["compile"][0][1:] == ["-m", "benchmarks.gpu", "--compile-only", "--shapes", "2x3"]
    assert commands["train_4x16"][0][-4:] == ["--data", "books", "--out", str(tmp_path / "train_4x16")]
    options.minutes = 0.1
    assert list(gpu.run_all(list(gpu.STEPS[:1]), options, run)) == ["compile: no time left"]


def test_a_step_that_takes_too_long_is_stopped(tmp_path):
    assert gpu.run(["sleep", "30"], dict(os.environ), 0.5) is None
    assert gpu.run([sys.executable, "-c", "raise SystemExit(5)"], dict(os.environ), 60.0) == 5


def test_gpu_steps_run_dry(tmp_path):
    """The same commands run in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--steps", "decoding"]
    command += ["--shapes", "2x3", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "decoding: done" in result.stdout
    rows = json.loads((tmp_path / "decoding-cpu.json").read_text())["rows"]
    assert {row["tokens"] for row in rows} == {1, 4}
    assert all("GPU" in row["not measured"] if row["who"].endswith("graph") else row["median_us"] > 0 for row in rows)
