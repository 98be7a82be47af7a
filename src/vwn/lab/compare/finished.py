"""Reading the runs, and the budgets of runs, that have ended in a comparison's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vwn.common.files import read_json
from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.studies import STUDIES
from vwn.training.branches import finished


def finished_runs(config: CompareConfig) -> list[dict[str, Any]]:
    """Return the ``arms`` of the report: each run as far as it has ended; one that nothing has ended of is absent."""
    found = []
    for seed in config.seeds:
        for arm in config.parsed:
            result = finished(config.run(arm, seed).out)
            if result is not None:
                found.append({**dataclasses.asdict(result), "name": arm.name, "options": arm.options_set})
    return found


def facts(config: CompareConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Return what the report says of a comparison: how it was made, and what it asks.

    Args:
        config: the comparison.
        record: its ``compare.json``.
    """
    return {
        **{name: record.get(name) for name in ("command", "created", "versions", "machine")},
        "continued": record.get("continued", []),
        "study": config.study,
        "question": STUDIES[config.study].question if config.study else None,
        "baseline": config.baseline,
    }


def read_report(folder: Path) -> dict[str, Any]:
    """Read a folder's report, with all that has ended since it was written if a comparison is run there."""
    path, record_path = folder / "report.json", folder / "compare.json"
    report = read_json(path) if path.exists() else {}
    if not record_path.exists():
        return report
    record = read_json(record_path)
    plan = record["plan"]
    config = CompareConfig(folder, plan["study"], tuple(plan["arms"]), seeds=tuple(plan["seeds"]))
    runs = finished_runs(config)
    if not runs:
        return report
    settings = report.get("config") or {name.split(".")[-1]: value for name, value in record["config"].items()}
    settings |= {"arms": [arm.name for arm in config.parsed], "seeds": list(config.seeds)}
    return {**report, **facts(config, record), "config": settings, "arms": runs}
