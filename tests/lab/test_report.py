"""What a comparison writes: strict JSON, CSV, a page that stands alone, and honest words."""

from __future__ import annotations

import csv
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from curves import arm, curve, realistic, report, study, sweep_of
from vwn.common.errors import UserError
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.story import cautions, headline, read_recorded, recorded_runs, recorded_sentence
from vwn.lab.analysis.wording import estimate
from vwn.lab.compare.finished import read_report
from vwn.lab.report.write import format_table, readme_tables, renew, write_report

HOSTILE = "<img src=x onerror=\"console.error('in')\"></style><!--<b>'&amp;%{x}"


RESULTS = Path(__file__).parents[2] / "results"
RECORDED = "3 recorded runs have -0.100 ± 0.010 in next-token loss (significant)"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text.append(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two_seeds(*differences: float) -> dict[str, Any]:
    """A report of plain and 4x16 in which 4x16 ends by `differences` off plain's 3.0."""
    arms = [arm("plain", seed, curve([5, 4, 3])) for seed in range(len(differences))]
    return report(*arms, *(arm("4x16", seed, curve([5, 4, 3 + gap])) for seed, gap in enumerate(differences)))


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    points = curve([4, math.nan, math.inf])
    source = report(arm("plain", 0, points), config={"out": Path("runs/try"), "bad": -math.inf})
    write_report(source, tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new/folder/report.json").read_text(), parse_constant=pytest.fail)
    assert [point["loss"] for point in written["arms"][0]["curve"]] == [4, None, None]
    assert written["config"] == {"out": str(Path("runs/try")), "bad": None}
    assert written["summary"][0]["loss"]["final"]["mean"] is None
    assert written["command"] == source["command"]


def test_csv_holds_every_point(tmp_path: Path) -> None:
    source = report(arm("plain", 0, curve([4, math.nan])), arm('2x3,"b', 7, curve([4.5, 3.25], [5, 4])))
    write_report(source, tmp_path)
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["arm", "m", "n", "r", "seed", "tokens", "seconds", "loss", "loss_2"]
    assert rows[2] == ["plain", "1", "1", "1.0", "0", "200", "1.0", "", ""]
    assert rows[4] == ['2x3,"b', "2", "3", "1.5", "7", "200", "1.0", "3.25", "4"]
    assert len(rows) == 5


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_files_are_replaced_whole(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(two_seeds(-0.1), tmp_path)
    before = contents(tmp_path)
    assert {name for name in before if "/" not in name} == {"curves.csv", "report.html", "report.json"}
    assert "figures/gain.svg" in before

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(two_seeds(-0.2), tmp_path)
    assert contents(tmp_path) == before


def test_page_has_the_content_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    source = realistic(("plain", HOSTILE, "4x16"))
    write_report(source, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    loading = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "background", "ping") and value != "data:,"
    ]
    assert loading == []
    assert "url(" not in html.split("</style>")[0]
    assert "@import" not in html.split("</style>")[0]
    policies = [attributes.get("content") or "" for tag, attributes in page.tags if tag == "meta"]
    assert any(policy.startswith("default-src 'none'") and "http" not in policy for policy in policies)
    assert not {tag for tag, _ in page.tags} & {"img", "b", "script"}
    assert any(HOSTILE in text for text in page.text)
    text = " ".join(page.text)
    made_from = source["command"], headline(add_analysis(source))
    for expected in (*made_from, "a processor", "0.9, 0.95", "optim.betas", "0.1.0"):
        assert expected in text
    ids = [attributes.get("id") for _, attributes in page.tags]
    assert {"loss-over-tokens", "loss-over-tokens-2", "gain", "gain-2"} <= set(ids)
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    assert len((tmp_path / "report.html").read_bytes()) < 500_000
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")


def test_page_has_the_tables(tmp_path: Path) -> None:
    source = study("mtp")
    source["sweep"][1] = sweep_of("plain+mtp", 1, bracketed=False)
    write_report(source, tmp_path)
    analysed = json.loads((tmp_path / "report.json").read_text())
    tables = {table[0]: table[1:] for table in tables_of((tmp_path / "report.html").read_text())}
    costs = tables["Arms and their cost"]
    assert costs[0] == [
        *("Arm", "Connection", "m", "n", "r", "MTP", "Parameters", "FLOPs per token", "Tokens per second"),
        *("Peak memory", "Learning rate"),
    ]
    assert costs[3][:6] == ["4x16", "GHC", "4", "16", "4", "0"]
    rates = {row[0]: row[1:] for row in tables["Learning-rate sweep"]}
    assert rates["plain+mtp"] == ["0.006", "no, at the edge", "0.003: 3.31000.006: 3.2100"]
    assert rates["plain"][1] == "yes"
    pairs = tables["Row minus column, final next-token loss"]
    assert pairs[0] == ["Arm", "plain", "plain+mtp", "4x16", "4x16+mtp"]
    cell = analysed["pairwise"]["loss"]["4x16"]["plain+mtp"]
    assert pairs[3][2] == estimate(cell["difference"], signed=True).replace("-", "−") + "lower"
    equal = {row[0]: row[1:] for row in tables["At equal cost, next-token loss"]}
    found = analysed["summary"][2]["loss"]["equal_flops"]
    assert found["baseline_share"] == 1
    share = f"4x16 read at {100 * found['arm_share']:.0f}\u00a0%"
    word = {"lower": "lower", "higher": "higher", "undecided": "not significant"}[found["verdict"]]
    assert equal["4x16"][1] == estimate(found["difference"], signed=True).replace("-", "−") + word + share
    assert "plain" not in equal
    assert "At equal cost, next-2-token loss" not in tables
    assert any("plain+mtp: the best learning rate lies at the edge" in text for text in cautions(analysed))


def tables_of(html: str) -> list[list[Any]]:
    """Each table's name, then its rows of cell texts."""
    found: list[list[Any]] = []
    for label, body in re.findall(r'<table aria-label="(.*?)">(.*?)</table>', unescape(html), re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]
        found.append([label, *([re.sub(r"<.*?>", "", cell) for cell in row] for row in cells)])
    return found


@pytest.mark.parametrize("folder", [path.parent for path in RESULTS.glob("*/report.json")], ids=lambda path: path.name)
def test_the_committed_tables_are_those_of_the_json(folder: Path) -> None:
    made = readme_tables(add_analysis(json.loads((folder / "report.json").read_text())))
    assert f"<!-- made by vwn report -->\n{made}\n<!-- end -->" in (folder / "README.md").read_text()
    assert (folder / "report.html").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (
            (-0.102, -0.098),
            "4x16 ended 0.100 ± 0.003 nats per token below plain in next-token loss (4 % fewer tokens for the "
            "same loss), over 2 seeds.",
        ),
        (
            (0.102, 0.098),
            "4x16 ended 0.100 ± 0.003 nats per token above plain in next-token loss (plain’s final loss not "
            "reached), over 2 seeds.",
        ),
        (
            (-0.1, 0.08),
            "4x16 ended 0.010 ± 0.127 nats per token below plain in next-token loss (plain’s final loss not "
            "reached in 1 of 2 seeds; not significant), over 2 seeds.",
        ),
        (
            (-0.1,),
            "4x16 ended 0.100 nats per token below plain in next-token loss (4 % fewer tokens for the same loss), in "
            "one seed.",
        ),
        ((-0.1, math.nan), "4x16 cannot be compared with plain: diverged."),
    ],
)
def test_headline_says_what_the_numbers_carry(differences: tuple[float, ...], expected: str) -> None:
    assert headline(add_analysis(two_seeds(*differences))).replace("\u00a0", " ") == expected


def test_headline_has_both_losses_of_the_best_arm() -> None:
    arms = [arm("plain", seed, curve([5, 4, 3, 2], [6, 5, 4, 3])) for seed in (0, 1)]
    arms += [arm("4x16", 0, curve([5, 3, 2, 1], [6, 4, 3, 2])), arm("4x16", 1, curve([5, 3, 2, 1.1], [6, 4, 3, 2]))]
    gained = (
        "ended 0.950 ± 0.071 nats per token below plain in next-token loss (25 % fewer tokens for the same loss) "
        "and 1.000 ± 0.000 below in next-2-token loss (25 % fewer tokens), over 2 seeds."
    )
    assert headline(add_analysis(report(*arms))).replace("\u00a0", " ") == f"4x16 {gained}"
    arms += [arm("2x3", seed, curve([5, 4, 3, 1.9])) for seed in (0, 1)]
    assert headline(add_analysis(report(*arms))).replace("\u00a0", " ") == f"4x16, the best of 2 arms, {gained}"


def test_headline_without_anything_to_compare() -> None:
    assert "plain was not run" in headline(add_analysis(report(arm("4x16", 0, curve([4])))))
    assert "Only the baseline plain" in headline(add_analysis(report(arm("plain", 0, curve([4])))))
    unshared = report(arm("plain", 0, curve([4])), arm("4x16", 1, curve([4])))
    assert "no shared seed" in headline(add_analysis(unshared))
    unequal = report(arm("plain", 0, curve([4, 3])), arm("4x16", 0, curve([4])))
    assert "different budgets" in headline(add_analysis(unequal))


@pytest.mark.parametrize(
    ("difference", "steps", "expected"),
    [
        (-0.1, 3, f"{RECORDED}; this result is within their range."),
        (-0.2, 3, f"{RECORDED}; this result is outside their range."),
        (-0.1, 4, ""),
    ],
)
def test_recorded_runs_stand_beside_the_result(difference: float, steps: int, expected: str, tmp_path: Path) -> None:
    write_report(two_seeds(-0.1, -0.11, -0.09), tmp_path / "recorded")
    before = read_recorded(tmp_path / "recorded" / "report.json")
    assert before == recorded_runs(two_seeds(-0.1, -0.11, -0.09))
    source = two_seeds(difference)
    for run in source["arms"]:
        run["curve"] = curve([5, 4, 3.5, run["curve"][-1]["loss"]][-steps:])
    source["recorded"] = before
    analysed = add_analysis(source)
    assert recorded_sentence(analysed).replace("\u00a0", " ") == expected
    assert any("recorded runs have 300 tokens" in text for text in cautions(analysed)) == (expected == "")
    assert expected in " ".join(format_table(source).split())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arms": [1]}'])
def test_a_file_without_a_comparison_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"--recorded: .*report\.json holds no comparison"):
        read_recorded(tmp_path / "report.json")
    with pytest.raises(UserError, match="nowhere"):
        read_recorded(tmp_path / "nowhere")


def test_samples_stand_beside_each_other(tmp_path: Path) -> None:
    source = realistic()
    for run in source["arms"]:
        run["sample"] = None if run["name"] == "2x3" else f"{run['name']} {run['seed']} <script>"
    write_report(source, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h3>(.*?) writes</h3><pre>(.*?)</pre>", html) == [
        ("plain", "plain 0 &lt;script&gt;"),
        ("4x16", "4x16 0 &lt;script&gt;"),
    ]


def test_an_uneven_speed_is_told_beside_the_median_step(tmp_path: Path) -> None:
    source = realistic()
    for run in source["arms"]:
        run |= {"step_seconds_median": 0.1, "step_seconds_p90": 0.3 if run["name"] == "4x16" else 0.11}
    write_report(source, tmp_path)
    assert any(text.startswith("4x16: the speed was uneven") for text in cautions(add_analysis(source)))
    costs = {name: rows for name, *rows in tables_of((tmp_path / "report.html").read_text())}["Arms and their cost"]
    assert [row[costs[0].index("Median step")] for row in costs[1:]] == ["100 ms", "100 ms1.00×", "100 ms1.00×uneven"]


def test_a_folder_is_renewed_from_its_json(tmp_path: Path) -> None:
    write_report(realistic(), tmp_path)
    before = contents(tmp_path)
    (tmp_path / "README.md").write_text("# Title\n<!-- made by vwn report -->\nold\n<!-- end -->\nkept\n")
    (tmp_path / "report.html").unlink()
    renew(read_report(tmp_path), tmp_path)
    readme = (tmp_path / "README.md").read_text()
    difference = estimate(add_analysis(realistic())["summary"][2]["loss"]["difference"], signed=True)
    assert "old" not in readme
    assert "| 4x16 | " in readme
    assert f" | {difference} (lower) | " in readme
    assert readme.endswith("<!-- end -->\nkept\n")
    (tmp_path / "README.md").unlink()
    assert contents(tmp_path) == before


def test_cautions_name_what_weakens_the_numbers() -> None:
    assert any("One seed gives no interval" in text for text in cautions(add_analysis(two_seeds(-0.1))))
    assert cautions(add_analysis(two_seeds(*[-0.1, -0.2] * 3))) == []
    diverged = cautions(add_analysis(two_seeds(-0.1, math.nan, -0.1)))
    assert any("4x16" in text and "seed 1" in text for text in diverged)


def test_table_fits_a_terminal() -> None:
    long = "1x1-with-a-name-that-does-not-fit"
    table = format_table(realistic(("plain", "2x3", "4x16", long, "bell\a\nline")))
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == ["arm", "final", "loss", "minus", "plain", "tokens"]
    assert long in table
    assert "bell??line" in table
    assert "next-2-token loss" in table
    table.encode("latin-1")


def test_the_terminal_ends_with_what_was_gained() -> None:
    text = format_table(study("widths"))
    assert max(map(len, text.splitlines())) <= 100
    *_, sentence, bars = text.split("\n\n")
    assert sentence.startswith("4x32, the best of 4 arms, ended ")
    title, plain, first, second = bars.splitlines()
    assert title == "tokens that 4x32 needs for plain's final loss"
    assert plain.split()[1:] == ["#" * 50, "100", "%"]
    share = add_analysis(study("widths"))["summary"][-1]["loss"]["tokens_fraction"]["mean"]
    assert first.split()[-3:] == ["#" * round(50 * share), f"{100 * share:.0f}", "%"]
    assert second.startswith("next-2-token loss  ###")


def test_table_says_what_was_reached() -> None:
    arms = [arm("plain", seed, curve([5, 4, 3, 2])) for seed in (0, 1)]
    arms += [arm("4x16", 0, curve([5, 3, 2, 1])), arm("4x16", 1, curve([5, 3, 2, 1.5]))]
    arms += [arm("2x3", 0, curve([5, 3, 2, 1])), arm("2x3", 1, curve([5, 4, 3, 2.5]))]
    arms += [arm("1x1", seed, curve([5, 4, 3, 2.5])) for seed in (0, 1)]
    rows = {line.split()[0]: line for line in format_table(report(*arms)).splitlines()[2:6]}
    assert rows["plain"].split()[-3:] == ["baseline", "100", "%"]
    assert rows["4x16"].split()[1:] == ["1.250", "±", "0.354", "-0.750", "±", "0.354", "75", "%"]
    assert rows["2x3"].endswith("reached in 1 of 2 seeds")
    assert rows["1x1"].endswith("not reached")


def test_digits_follow_the_spread() -> None:
    assert estimate({"mean": -0.02, "std": 0.0004}, signed=True) == "-0.0200\u00a0±\u00a00.0004"
    assert estimate({"mean": 1.0, "std": None}) == "1.000"
    assert estimate({"mean": None, "std": None}) == "–"
