"""Train the arms of a comparison one after the other, on the same data in the same order, and report."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from vwn.compare.analysis import add_analysis
from vwn.compare.config import BASELINE, CompareConfig, parse_width
from vwn.compare.report import format_table, write_report
from vwn.data import Corpus, prepare
from vwn.errors import UserError
from vwn.geometry import Geometry
from vwn.training.machine import provenance
from vwn.training.model import load_backbone, model_config
from vwn.training.presets import PRESETS
from vwn.training.run import RunResult, settings, train


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison; write ``report.json``, ``curves.csv`` and ``report.html`` after every arm; return the report.

    Raises:
        UserError: as :func:`vwn.training.train`; all arms are checked before the first is trained.
    """
    config.check()
    if config.out.exists() and any(config.out.iterdir()) and not config.resume:
        raise UserError(f"the directory {config.out} exists already; continue it with --resume or choose another --out")
    runs = [config.arm(width, seed) for seed in config.seeds for width in config.widths]
    for run in runs:
        run.check()
    c = config.corpus
    corpus = prepare(c.data, valid=c.valid, tokenizer=c.tokenizer, window=c.window)
    check_arms(config, corpus)

    warn_of_untuned_rates(config)
    config.out.mkdir(parents=True, exist_ok=True)
    about = {**provenance(), "config": describe(config, corpus), "baseline": BASELINE}
    results: list[RunResult] = []
    report: dict[str, Any] = {}
    for number, run in enumerate(runs, 1):
        label = f"[{number}/{len(runs)}] {run.name} seed {run.seed}"
        results.append(train(run, corpus, label))
        report = add_analysis({**about, "arms": [dataclasses.asdict(r) for r in results]})
        write_report(report, config.out)
    print(format_table(report))
    print(f"\nreport: {config.out / 'report.html'}")
    return report


def check_arms(config: CompareConfig, corpus: Corpus) -> None:
    """Refuse what no arm could be trained with, before hours are spent on the others."""
    backbone = load_backbone(config.backbone, len(corpus.tokenizer), config.corpus.window)
    for width in config.widths:
        m, n = parse_width(width)
        if m is not None and n is not None:
            Geometry(backbone.hidden_size, m, n)
        model_config(backbone, m, n, config.width)


def warn_of_untuned_rates(config: CompareConfig) -> None:
    """An arm at a rate that suits another arm better says nothing about the arm."""
    taken_from_preset = [w for w in config.widths if w not in config.rates and config.optim.learning_rate is None]
    shared = [w for w in config.widths if w not in config.rates and config.optim.learning_rate is not None]
    if len(shared) > 1:
        print(f"vwn: one learning rate for {', '.join(shared)}; tune each arm (--learning-rates)", file=sys.stderr)
    if taken_from_preset and config.backbone in PRESETS and not PRESETS[config.backbone].swept:
        print(
            f"vwn: the learning rates of the preset {config.backbone!r} are a rule of thumb, not tuned; "
            "sweep them for each arm (--learning-rates) before you trust the comparison",
            file=sys.stderr,
        )


def describe(config: CompareConfig, corpus: Corpus) -> dict[str, Any]:
    """What all arms have in common, for the report."""
    shared = settings(config.arm(BASELINE, 0))
    for own in ("m", "n", "seed", "optim.learning_rate"):
        shared.pop(own)
    return {
        **{name.split(".")[-1]: value for name, value in shared.items()},
        "widths": list(config.widths),
        "seeds": list(config.seeds),
        "train_tokens": corpus.train_tokens,
        "valid_tokens": corpus.valid_tokens,
        "vocabulary": len(corpus.tokenizer),
        "valid_bytes_per_token": corpus.valid_bytes_per_token,
    }
