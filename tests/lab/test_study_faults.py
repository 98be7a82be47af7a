"""A study of two budgets that is killed at random moments ends like one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from runs import without_seconds

pytestmark = pytest.mark.slow


def study(out, text):
    return [
        sys.executable, "-m", "vwn", "compare", "--out", str(out), "--data", str(text), "--window", "32",
        "--max-valid-tokens", "256", "--backbone", "nano", "--arms", "plain", "wide:4x10,learning_rate=0.01",
        "--lr-sweep", "on", "--sweep-rates", "0.002", "0.005", "0.01", "--sweep-extensions", "0", "--sweep-steps", "4",
        "--seeds", "0", "--schedule", "wsd", "--budgets", "768", "1536", "--batch-size", "4",
        "--eval-every", "4", "--save-every", "2",
    ]  # fmt: skip


def losses(out):
    report = json.loads((out / "report.json").read_text())
    arms = [(a["name"], a["learning_rate"], *map(without_seconds, (a["curve"], a["decayed"]))) for a in report["arms"]]
    return arms, report["sweep"]


def test_a_study_killed_twice_has_the_same_losses_bit_for_bit(tmp_path, text):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    subprocess.run(study(tmp_path / "whole", text), env=env, check=True, capture_output=True)
    duration = time.monotonic() - start

    killed = study(tmp_path / "killed", text)
    moments, kills = random.Random(0), []
    while len(kills) < 2:
        more = ["--resume"] if (tmp_path / "killed" / "compare.json").exists() else []
        process = subprocess.Popen([*killed, *more], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = moments.uniform(0.2, 0.45) * duration
        try:
            process.wait(timeout=after)
            break  # a fast machine was done before the second kill
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append(round(after, 2))
    results = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*/*/**/result.json")}
    subprocess.run([*killed, "--resume"], env=env, check=True, capture_output=True)

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed after {kills} of {duration:.1f} s"
    assert kills
    assert {p: p.stat().st_mtime_ns for p in results} == results  # what had ended was not repeated
