"""Injected faults: nothing that was reported as saved is lost, and every resumed run is the one left alone.

`make test-faults` injects them all and writes their table; a sample of every kind runs with the other tests.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from faults import DAMAGES, KINDS, NEWEST, SAVE, SEED, Lab
from vwn.training.checkpoint.manifest import last_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, text):
    """All runs of this file; when all faults were injected, their outcomes are written where VWN_FAULTS_TABLE says."""
    found = Lab(tmp_path_factory.mktemp("lab"), text)
    yield found
    gc.unfreeze()
    if os.environ.get("VWN_FAULTS_TABLE"):
        Path(os.environ["VWN_FAULTS_TABLE"]).write_text(table(found.outcomes))


def table(outcomes: dict[str, Counter[str]]) -> str:
    rows = [
        f"| {kind} | {counts.total()} | {'; '.join(f'{outcome} ({n})' for outcome, n in counts.items())} |\n"
        for kind, counts in outcomes.items()
    ]
    total = sum(counts.total() for counts in outcomes.values())
    return "".join(
        ["| fault | injected | outcome |\n|---|---|---|\n", *rows, f"| **all** | **{total}** | none lost |\n"]
    )


def inject(lab: Lab, kind: str, count: int | None = None) -> None:
    cases = list(KINDS[kind](lab))
    if count is not None:
        cases = random.Random(SEED).sample(cases, min(count, len(cases)))
    for name, fault in cases:
        out = lab.copy()
        try:
            outcome = fault(lab, out)
        except AssertionError as error:
            raise AssertionError(f"{kind}, {name}: {error}") from error
        lab.outcomes.setdefault(kind, Counter())[outcome] += 1
        shutil.rmtree(out)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_all_faults(lab, kind) -> None:
    inject(lab, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_to_a_checkpoint_is_seen(lab, kind) -> None:
    for name, spoil in DAMAGES[kind](lab):
        out = lab.copy()
        spoil(out / NEWEST)
        assert last_checkpoint(out) == out / f"checkpoint-{SAVE}", name
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in [*DAMAGES][1:]])
def test_a_sample_of_faults(lab, kind) -> None:
    inject(lab, kind, count=1)


def test_the_table_of_the_documentation_has_every_kind() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert {row[1].strip() for row in rows if row[2].strip(" *").isdigit()} == {*KINDS, "**all**"}
