"""`vwn compare` end to end on a small text."""

import dataclasses
import json
import subprocess
import sys

import pytest

from runs import compare_config
from vwn.common.errors import UserError
from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.run import adopt, compare, shared_settings, warn_of_untuned_rates
from vwn.training.config import CorpusConfig, OptimConfig, WidthOptions


def two_arms(out, text, **changes):
    options = {"arms": ("plain", "1x1"), "learning_rates": ("1x1=0.005",)}
    return compare_config(out, text, **options | changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, compare(two_arms(out, text))


def test_the_report_has_an_object_for_each_arm_and_seed(done):
    out, _ = done
    report = json.loads((out / "report.json").read_text())
    arms = report["arms"]
    assert [(a["name"], a["seed"]) for a in arms] == [(name, seed) for seed in (0, 1) for name in ("plain", "1x1")]
    wanted = {"name", "m", "n", "r", "seed", "params", "flops_per_token", "tokens_per_second", "peak_memory_bytes"}
    for arm in arms:
        assert wanted <= set(arm)
        assert [p["tokens"] for p in arm["curve"]] == [0, 256, 512, 768]
        assert all(set(p) == {"tokens", "loss", "loss_2", "seconds"} for p in arm["curve"])
        assert all(p["loss_2"] is not None for p in arm["curve"])  # MTP is on unless asked otherwise
    assert [a["learning_rate"] for a in arms[:2]] == [0.01, 0.005]
    assert report["command"]
    assert report["versions"]["torch"]
    assert report["config"]["train_tokens"] > 10_000


def test_arms_of_a_seed_start_alike_and_differ_by_width_alone(done):
    _, report = done
    plain, same, other = report["arms"][:3]
    assert plain["curve"][0]["loss"] == pytest.approx(same["curve"][0]["loss"], abs=1e-6)  # 1x1 starts as plain
    assert plain["curve"][0]["loss"] != other["curve"][0]["loss"]
    assert plain["params"] < same["params"]
    assert plain["flops_per_token"] < same["flops_per_token"]


@pytest.mark.slow
def test_an_arm_that_diverges_does_not_stop_the_others(tmp_path, text):
    diverging = compare_config(
        tmp_path / "out", text, arms=("plain", "4x10"), seeds=(0,), learning_rates=("plain=1e30",)
    )
    report = compare(diverging)
    plain, wide = report["arms"]
    assert plain["curve"][-1]["loss"] is None
    assert wide["curve"][-1]["loss"] < wide["curve"][0]["loss"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["arms"][1]["paired"]["loss"]["tokens"] is None
    again = compare(dataclasses.replace(diverging, resume=True))
    assert [a["curve"] for a in again["arms"]] == [a["curve"] for a in report["arms"]]


def test_what_was_left_away_on_resume_is_taken_from_the_record(done, text):
    out, _ = done
    asked = CompareConfig(out=out, arms=("plain", "2x3"), resume=True)
    adopted = adopt(asked, given={"out", "arms", "resume"})
    known = two_arms(out, text)
    everything = (*known.arms, "2x3")
    corpus = dataclasses.replace(known.corpus, tokenizer="bytes")  # the default, by its name
    assert adopted == dataclasses.replace(known, corpus=corpus, arms=everything, resume=True)
    assert adopt(asked, given={"out", "window", "resume"}).corpus.window == CorpusConfig().window


@pytest.mark.slow
def test_resuming_repeats_nothing_and_adds_arms(done, text):
    out, report = done
    results = {p: p.stat().st_mtime_ns for p in out.glob("arms/*/result.json")}
    more = compare(two_arms(out, text, arms=("plain", "1x1", "2x3"), resume=True))
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert [a for a in more["arms"] if a["name"] != "2x3"] == report["arms"]
    assert len(more["arms"]) == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": ("plain", "4by16")}, "MxN"),
        ({"arms": ("plain", "5x10")}, "does not divide"),
        ({"arms": ("plain", "plain")}, "twice"),
        ({"arms": ("plain", "2x3"), "width": WidthOptions(reduce="identity")}, "needs n = m"),
        ({"arms": ("plain", "4x8", "04x8")}, "twice"),
        ({"seeds": (0, -1)}, "--seed must be"),
        ({"arms": ("plain", "2x3"), "width": WidthOptions(reduce_norm="rms_norm")}, "integer r"),
        ({"learning_rates": ("8x64=0.1",)}, "not among the arms"),
        ({"learning_rates": ("plain:0.1",)}, "ARM=RATE"),
        ({"arms": ("plain", "big:plain,hidden_size=0")}, "above 0"),
        ({"arms": ("plain", "big:plain,hidden_scale=nan")}, "above 0"),
        ({"backbone": "huge"}, "unknown backbone"),
        ({"seeds": ()}, "at least one"),
        ({"optim": OptimConfig(schedule="wsd", budgets=("10k",), warmup_steps=99)}, "arm plain: .* within the 99"),
    ],
)
def test_refusals_come_before_anything_is_read(tmp_path, text, monkeypatch, changes, expected):
    monkeypatch.setattr("vwn.lab.compare.run.load_corpus", None)
    with pytest.raises(ValueError, match=expected):
        compare(compare_config(tmp_path / "out", text, **{"learning_rates": ()} | changes))
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_refused(done, text):
    out, _ = done
    with pytest.raises(UserError, match="exists already"):
        compare(two_arms(out, text))


def test_other_settings_are_refused_on_resume(done, text):
    out, _ = done
    with pytest.raises(UserError, match="--batch-size 4, not 8"):
        compare(two_arms(out, text, optim=OptimConfig(steps=6, batch_size=8, learning_rate=1e-2), resume=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": OptimConfig(steps=2, batch_size=4, learning_rate=1e-2)}, "rates of plain, 1x1 are one for all"),
        ({"optim": OptimConfig(steps=2, batch_size=4)}, "rates of plain, 1x1 are a rule of thumb"),
        ({"learning_rates": ("plain=0.01", "1x1=0.02")}, ""),
        ({"backbone": "tiny", "optim": OptimConfig(steps=2, batch_size=4)}, ""),
    ],
)
def test_untuned_rates_are_named(tmp_path, text, capsys, changes, expected):
    options = {"arms": ("plain", "1x1"), "learning_rates": ()} | changes
    warn_of_untuned_rates(compare_config(tmp_path, text, **options))
    said = capsys.readouterr().err
    assert expected in said
    assert bool(said) == bool(expected)


def test_a_rate_that_cannot_be_taken_on_does_no_harm(done, text):
    out, _ = done
    before = json.loads((out / "report.json").read_text())["arms"]
    with pytest.raises(UserError, match=r"the arm in .* with learning_rate 0.005, not 0.004"):
        compare(two_arms(out, text, learning_rates=("1x1=0.004",), resume=True))
    assert json.loads((out / "report.json").read_text())["arms"] == before
    assert compare(adopt(CompareConfig(out=out, resume=True), given={"out", "resume"}))["arms"] == before


def test_a_report_keeps_the_command_it_was_made_with_and_names_the_others(done, text, monkeypatch):
    out, report = done
    monkeypatch.setattr("sys.argv", ["vwn", "compare", "--resume"])
    again = compare(two_arms(out, text, resume=True, recorded=str(out)))
    assert again["command"] == report["command"]
    assert len(again["recorded"]["arms"]["1x1"]["loss"]) == 2
    assert "2 recorded runs have" in (out / "report.html").read_text()
    with pytest.raises(UserError, match="--recorded"):
        compare(two_arms(out, text, resume=True, recorded="nowhere"))
    assert again["continued"][-1]["command"] == "vwn compare --resume"
    assert "vwn compare --resume" in (out / "report.html").read_text()


def test_a_study_does_not_become_another_one(tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    asked = compare_config(out, text, study="widths", arms=(), learning_rates=(), resume=True)
    stored = {"config": shared_settings(asked), "plan": {"study": "family"}}
    (out / "compare.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="holds the study 'family', not 'widths'"):
        compare(asked)


def test_another_plain_arm_is_the_baseline_where_there_is_no_plain(tmp_path):
    assert CompareConfig(out=tmp_path, arms=("4x16", "base:plain,learning_rate=0.01")).baseline == "base"
    assert CompareConfig(out=tmp_path, arms=("base:plain", "plain")).baseline == "plain"
    assert CompareConfig(out=tmp_path, arms=("4x16",)).baseline == "plain"


def test_validation_smaller_than_a_batch_is_validated(tmp_path, text):
    small = CorpusConfig(data=str(text), window=32, max_valid_tokens=96)
    few = OptimConfig(steps=2, batch_size=4, learning_rate=1e-2)
    options = {"arms": ("plain",), "seeds": (0,), "learning_rates": (), "corpus": small, "optim": few}
    report = compare(compare_config(tmp_path / "out", text, **options))
    assert [p["tokens"] for p in report["arms"][0]["curve"]] == [0, 256]


@pytest.mark.slow
def test_the_peak_memory_of_a_small_arm_is_not_that_of_the_large_one_before_it(tmp_path, text):
    # a process of its own: `vwn compare` keeps freed memory, the tests do not
    command = [
        sys.executable, "-m", "vwn", "compare", "--out", str(tmp_path / "out"), "--data", str(text), "--window", "32",
        "--max-valid-tokens", "256", "--backbone", "nano", "--arms", "plain", "big:plain,hidden_size=512",
        "again:plain", "--steps", "1", "--batch-size", "4", "--learning-rate", "0.001",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    arms = json.loads((tmp_path / "out" / "report.json").read_text())["arms"]
    plain, big, again = (arm["peak_memory_bytes"] for arm in arms)
    assert again < (plain + big) / 2
