"""Short training runs: their configuration, also as a command line."""

from __future__ import annotations

import sys
from pathlib import Path

from vwn.cli import main
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import CorpusConfig, OptimConfig, TrainConfig, WidthOptions


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


def run_vwn(capsys, monkeypatch, *arguments):
    """Exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["vwn", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def compare_config(out, text, **changes):
    options = dict(
        out=out,
        backbone="nano",
        arms=("plain", "1x1", "4x10"),
        seeds=(0, 1),
        learning_rates=("4x10=0.005",),
        corpus=CorpusConfig(data=str(text), window=32, max_valid_tokens=256),
        optim=OptimConfig(steps=6, batch_size=4, learning_rate=1e-2),
        eval_every=2,
        save_every=6,
    )
    return CompareConfig(**options | changes)
