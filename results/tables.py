"""The tables of the results' pages that no report has, from the JSON files beside them.

python results/tables.py            # writes each table between its marks, <!-- table NAME --> and <!-- end NAME -->
python results/tables.py --check    # says which differ, and exits with 1 if one does
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from math import log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.budgets import budget_studies
from vwn.lab.analysis.estimates import t_95
from vwn.lab.analysis.wording import budget

RESULTS = Path(__file__).parent
MINUS = str.maketrans("-", "−")
TABLES: dict[str, Callable[[], str]] = {}


def table(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function that makes the table `name`, which is `page/table`."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        TABLES[name] = make
        return make

    return register


def read(name: str) -> Any:
    """Read a JSON file of the results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table."""
    heads = list(heads)
    return "\n".join(re.sub(r"  +", " ", f"| {' | '.join(line)} |") for line in [heads, ["---"] * len(heads), *lines])


def both(point: dict[str, Any]) -> str:
    """Write `next / next-2`."""
    return f"{point['loss']:.3f} / {point['loss_2']:.3f}"


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Write `a` minus `b` in both losses."""
    return " / ".join(f"{a[key] - b[key]:+.3f}" for key in ("loss", "loss_2")).translate(MINUS)


def with_error(values: list[float]) -> str:
    """Write the mean of differences over seeds, ± its standard error where there are several."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{error}".translate(MINUS) if values else ""


def average(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Average both losses."""
    return {key: mean(point[key] for point in points) for key in ("loss", "loss_2")}


def decayed(arm: str, seeds: Iterable[int], study: str = "long") -> dict[str, dict[str, Any]]:
    """Return the decayed losses of an arm of a study by budget, means over `seeds`."""
    runs = [run for run in read(f"{study}/report.json")["arms"] if run["name"] == arm and run["seed"] in set(seeds)]
    tokens = [point["tokens"] for point in runs[0]["decayed"]]
    points = [[p for run in runs for p in run["decayed"] if p["tokens"] == t] for t in tokens]
    return {budget(t): average(of_budget) for t, of_budget in zip(tokens, points, strict=True)}


@table("long/gaps")
def gaps() -> str:
    """Write by how much each arm is below plain at each budget."""
    studies = budget_studies(add_analysis(read("long/report.json")))
    names = {
        "1x4": "×4, `1x4`",
        "hc": "Hyper-Connections, `hc`",
        "4x8": "×2, `4x8`",
        "4x16": "×4, `4x16`",
        "4x32": "×8, `4x32`",
    }

    def cell(arm: str, key: str, budgets: tuple[str, ...]) -> str:
        found = {budget(point.tokens): point.equal["tokens"].gap.over_seeds for point in studies[key].arms[arm]}
        return ", ".join(f"{-found[name].mean:.3f}" for name in budgets if name in found)

    groups = ("1M", "2M", "4M", "8M"), ("16M", "32M")
    return rows(
        ["", "next token: 1, 2, 4, 8 M", "16, 32 M", "next-2 token: 1, 2, 4, 8 M", "16, 32 M"],
        [[name, *(cell(arm, key, group) for key in studies for group in groups)] for arm, name in names.items()],
    )


def factors(arms: Iterable[str], key: str, budgets: Iterable[str]) -> str:
    """Write how many times fewer tokens each arm needs for plain's loss at each budget."""
    study = budget_studies(add_analysis(read("long/report.json")))[key]
    lines = []
    for arm in arms:
        known = {budget(t): found for t, found in study.tokens_factors[arm].items() if found.over_seeds.mean}
        texts = []
        for found in (known.get(b) for b in budgets):
            text = "" if found is None else found.text(".2f").replace("one seed", f"seed {min(found.by_seed)}")
            texts.append(text + (" (extrapolated)" if found and found.extrapolated else ""))
        lines.append([f"`{arm}`", *texts])
    return rows(["", *(b.replace("M", " M") for b in budgets)], lines)


@table("long/fewer")
def fewer() -> str:
    """Write `factors` in next-token loss."""
    return factors(["4x32", "1x4", "4x16", "4x8", "hc"], "loss", ["2M", "4M", "8M", "16M", "32M"])


@table("long/fewer-2")
def fewer_2() -> str:
    """Write `factors` in next-2-token loss."""
    return factors(["4x32", "1x4", "4x16", "4x8", "hc"], "loss_2", ["2M", "4M", "8M", "16M", "32M"])


@table("long/baselines")
def baselines() -> str:
    """Write how many times fewer tokens wide models need at other rates, and against `1x1`."""
    late = [e for e in read("long/rates.json") if e["seed"] == 0 and e["learning_rate"] == 3e-3]
    half = {(e.get("arm", "plain"), e.get("where")): {0: e["decayed"]} for e in late}
    residuals: dict[int, list[dict[str, Any]]] = {}
    for run in read("long/without-width.json")["runs"]:
        if run["arm"] == "1x1":
            residuals.setdefault(run["seed"], []).append(run)
    lines = []
    for name, replaced, arms in (
        ("plain at 3e-3", {"plain": half["plain", None]}, ("1x4", "4x16", "4x32")),
        ("plain at 3e-3, `1x4` too", {arm: half[arm, "another machine"] for arm in ("plain", "1x4")}, ("1x4",)),
        ("`1x1`", {"plain": residuals}, ("1x4", "4x16", "4x32")),
    ):
        report, points = read("long/report.json"), replaced["plain"]
        report["arms"] = [r for r in report["arms"] if r["seed"] in points and r["name"] in ("plain", *arms)]
        for run in report["arms"]:
            if run["name"] in replaced:
                run["decayed"] = replaced[run["name"]][run["seed"]]
        studies = budget_studies(add_analysis(report))
        for b in [budget(point["tokens"]) for point in points[0]][-3:]:
            cells = []
            for arm in arms:
                found = [{budget(t): f for t, f in study.tokens_factors[arm].items()}[b] for study in studies.values()]
                texts = [f.text(".2f") + " (extrapolated)" * f.extrapolated for f in found]
                cells.append(" / ".join(text.replace(" (one seed)", "") for text in texts))
            seeds = ", ".join(map(str, sorted(found[0].by_seed)))
            lines.append([name, b.replace("M", " M"), seeds, *cells, *[""] * (3 - len(arms))])
    return rows(["baseline", "tokens", "seeds", "`1x4`", "`4x16`", "`4x32`"], lines)


@table("long/control")
def control() -> str:
    """Write ×8 beside a plain model of twice the width."""
    runs = read("long/control.json")["runs"]
    lines = []
    for name in dict.fromkeys(run["budget"] for run in runs):
        some = [run for run in runs if run["budget"] == name]
        seeds = [run["seed"] for run in some]
        count = str(len(seeds)) if len(seeds) > 1 else f"seed {seeds[0]}"
        lines.append([name.replace("M", " M"), count, both(decayed("4x32", seeds)[name]), both(average(some))])
    return rows(["tokens", "seeds", "×8", "plain of width 64"], lines)


@table("long/without-width")
def without_width() -> str:
    """Write what learned residuals, a wide table and Hyper-Connections reach."""
    runs = {(run["arm"], run["seed"], run["budget"]): run for run in read("long/without-width.json")["runs"]}
    arms = {"plain": "plain", "1x1": "`1x1`", "plain-table": "`plain-table`", "hc": "`hc`, ×4", "1x4": "×4, `1x4`"}
    lines = []
    for seeds, budgets in (((0,), ("1M", "2M", "4M", "8M")), ((0, 1, 2), ("4M", "8M"))):
        found = {arm: decayed(arm, seeds) for arm in ("plain", "hc", "1x4")}
        for b in budgets:
            cells = []
            for arm in arms:
                known = [runs[arm, s, b] for s in seeds if (arm, s, b) in runs]
                point = found[arm][b] if arm in found else average(known) if len(known) == len(seeds) else None
                cells.append("" if point is None else both(point))
            if all(cells):
                lines.append([b.replace("M", " M"), ", ".join(map(str, seeds)), *cells])
    return rows(["tokens", "seeds", *arms.values()], lines)


@table("long/identity")
def identity() -> str:
    """Write what a carry that stays the identity changes at each budget."""
    runs = {(run["arm"], run["seed"], run["budget"]): run for run in read("long/identity.json")["runs"]}
    lines = []
    for arm in dict.fromkeys(arm for arm, _, _ in runs):
        for b in dict.fromkeys(b for name, _, b in runs if name == arm):
            seeds = sorted(s for name, s, of in runs if (name, of) == (arm, b))
            study = "long" if arm == "4x32" else "controls-4m"  # of the identity runs' machine, which has no 4x32
            pairs = [(runs[arm, s, b], decayed(arm, [s], study)[b]) for s in seeds]
            cells = [with_error([ours[key] - theirs[key] for ours, theirs in pairs]) for key in ("loss", "loss_2")]
            reached = both(average([ours for ours, _ in pairs]))
            lines.append([f"`{arm}`", b.replace("M", " M"), ", ".join(map(str, seeds)), reached, *cells])
    return rows(["model", "tokens", "seeds", "next / next-2", "difference, next", "difference, next-2"], lines)


@table("long/rates")
def long_rates() -> str:
    """Write plain's losses at each rate."""
    lines: dict[tuple[float, str], dict[str, str]] = {}
    for entry in read("long/rates.json"):
        if entry["seed"] == 1001:
            factor = re.search(r"table=(\d+)", entry["command"])[1]
            cells = lines.setdefault((entry["learning_rate"], factor), {})
            cells |= {budget(point["tokens"]): both(point) for point in entry["decayed"]}
    order = sorted(lines, key=lambda row: (-row[0], int(row[1])))
    budgets = ["1M", "2M", "4M", "8M"]
    return rows(
        ["rate", "table", *(b.replace("M", " M") for b in budgets)],
        [[f"{rate:g}", f"×{factor}", *(lines[rate, factor].get(b, "") for b in budgets)] for rate, factor in order],
    )


@table("long/rates-late")
def late_rates() -> str:
    """Write the losses at lower rates and larger budgets, seed 0."""
    lines, budgets = [], ("8M", "16M", "32M")
    for arm in ("plain", "1x4"):
        lines.append([f"`{arm}`", "0.006", "the study's", *(both(decayed(arm, [0])[b]) for b in budgets)])
        for entry in read("long/rates.json"):
            if entry["seed"] == 0 and entry.get("arm", "plain") == arm:
                found = {budget(point["tokens"]): both(point) for point in entry["decayed"]}
                place = entry.get("where", "the study's")
                lines.append([f"`{arm}`", f"{entry['learning_rate']:g}", place, *(found.get(b, "") for b in budgets)])
    return rows(["model", "rate", "machine", "8 M", "16 M", "32 M"], lines)


@table("long/table-40")
def table_40() -> str:
    """Write the earlier run's losses."""
    arms = {arm["name"]: {budget(p["tokens"]): p for p in arm["decayed"]} for arm in read("long/table-40.json")["arms"]}
    wide = ("4x16", "4x32")
    return rows(
        ["tokens", "plain", "×4", "×8"],
        [[b.replace("M", " M"), both(p), *(difference(arms[w][b], p) for w in wide)] for b, p in arms["plain"].items()],
    )


@table("long/eval")
def evaluations() -> str:
    """Write what the last checkpoints score."""

    def score(found: dict[str, Any], name: str) -> str:
        return f"{found['scores'][name]['value']:.3f} ± {found['scores'][name]['stderr']:.3f}"

    lines = []
    for tokens, models in read("long/eval.json")["arms"].items():
        for model, tasks in models.items():
            lost = tasks["lambada_openai"]["scores"]["perplexity"]
            lambada = f"{log(lost['value']):.2f} ± {lost['stderr'] / lost['value']:.2f}"
            scores = [score(tasks["blimp"], "acc"), score(tasks["hellaswag"], "acc_norm"), lambada]
            lines.append([tokens.replace("M", " M"), model, *scores])
    return rows(
        [
            "tokens",
            "",
            "BLiMP, 250 rows of each subset",
            "HellaSwag, 2,500 rows",
            "LAMBADA, 2,500 rows: log perplexity",
        ],
        lines,
    )


@table("long/decoding")
def decoding() -> str:
    """Write how well multi-token decoding works."""
    lines = []
    for row in [row for run in read("long/decoding.json") for row in run["rows"]]:
        model, tokens = row["who"].split("-seed")[0], row["who"].split("/")[-1].replace("M", " M")
        speed = f"{row['speed_up']:.2f} ({row['lowest_speed_up']:.2f} to {row['highest_speed_up']:.2f})"
        times = [f"{row['greedy_ms_per_token']:.1f}", f"{row['ms_per_token']:.1f}"]
        lines.append([tokens, model, f"{row['acceptance']:.2f}", f"{row['tokens_per_pass']:.2f}", *times, speed])
    heads = ["tokens", "", "drafts accepted", "tokens per pass", "greedy, ms per token", "with drafts"]
    return rows([*heads, "speed-up (smallest to largest)"], lines)


@table("widen/sweep")
def widen_sweep(runs: list[dict[str, Any]] | None = None) -> str:
    """Write the losses at each rate of a widened model."""
    lines: dict[str, dict[str, str]] = {}
    for run in read("widen/sweep.json")["runs"] if runs is None else runs:
        rate = re.search(r"--learning-rate (\S+)", run["command"])[1]
        name = f"{rate}, routing ×5" if "routing=5" in run["command"] else rate
        lines.setdefault(name, {})[run["arm"]] = f"{run['loss']:.4f}"
    arms = list(dict.fromkeys(arm for found in lines.values() for arm in found))
    order = sorted(lines, key=lambda name: ("routing" in name, -float(name.split(",")[0])))
    return rows(["rate", *(f"`{arm}`" for arm in arms)], [[n, *(lines[n].get(arm, "") for arm in arms)] for n in order])


@table("widen/one-segment")
def one_segment() -> str:
    """Write what a model widened with one segment gains over plain, beside FFNs with as many new parameters."""
    runs = {(run["arm"], run["seed"], run["budget"]): run for run in read("widen/one-segment.json")["runs"]}
    budgets = list(dict.fromkeys(b for _, _, b in runs))
    lines = []
    for arm in [name for name in dict.fromkeys(name for name, _, _ in runs) if name != "plain"]:
        seeds = sorted({s for name, s, _ in runs if name == arm})
        own, plain = ((runs[name, seeds[0], budgets[0]]) for name in (arm, "plain"))
        cells = [f"`{arm}`", *(f"{own[key] / plain[key]:.2f} ×" for key in ("params", "flops_per_token"))]
        for b in budgets:
            less = [runs[arm, s, b]["loss"] - runs["plain", s, b]["loss"] for s in seeds]
            half = t_95(len(less)) * stdev(less) / len(less) ** 0.5
            bounds = f" ({mean(less) - half:+.4f} to {mean(less) + half:+.4f})"
            cells.append(f"{mean(less):+.4f}{bounds}".translate(MINUS))
        lines.append(cells)
    return rows(["", "parameters", "FLOPs", "0.8 M tokens more", "1.6 M tokens more"], lines)


@table("widen/one-segment-rates")
def one_segment_rates() -> str:
    """Write the losses at each rate of models widened with one segment and to twice the width."""
    return widen_sweep(read("widen/one-segment.json")["sweep"])


@table("quickstart/rates")
def quickstart_rates() -> str:
    """Write the quickstart's rates."""
    return by_rate(read("quickstart/rates.json")["runs"], lambda run: ())


@table("optimisers/rates")
def optimiser_rates() -> str:
    """Write each optimiser's rates."""
    runs = read("optimisers/runs.json")["runs"]
    return by_rate(runs, lambda run: ({"adamw": "AdamW", "muon": "Muon"}[run["optimizer"]],), ["optimiser"])


def by_rate(
    runs: list[dict[str, Any]], first: Callable[[dict[str, Any]], tuple[str, ...]], heads: Iterable[str] = ()
) -> str:
    """Write one row for each rate and factor of the table, and a column for each model."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for run in runs:
        factor = run.get("table") or float(run["rate_factors"][0].removeprefix("table="))
        row = (*first(run), f"{run['learning_rate']:g}", f"×{factor:g}")
        lines.setdefault(row, {})[run["model"]] = both(run)
    models = list(dict.fromkeys(run["model"] for run in runs))
    return rows(
        [*heads, "rate", "table", *models],
        [[*row, *(found.get(m, "") for m in models)] for row, found in lines.items()],
    )


@table("embedding/rates")
def embedding_rates() -> str:
    """Write what a table's rate is worth to each form of table."""
    known = {
        name.rpartition("-seed"): run for entry in read("embedding/rates.json") for name, run in entry["runs"].items()
    }
    points = {(arm, seed): {"loss": run["next"], "loss_2": run["next_2"]} for (arm, _, seed), run in known.items()}
    for run in read("embedding/report.json")["arms"]:
        if run["name"] == "ngram":
            points["ngram-10", str(run["seed"])] = run["decayed"][-1]
    lines = []
    for name, seed, arms in (
        ("`factorised` (seed 1001)", "1001", ("f-1", "", "f-10")),
        ("the same, its linear at 0.3 times the rate", "1001", ("", "", "f-10-0.3")),
        ("the same, its linear at 0.1 times the rate", "1001", ("", "", "f-10-0.1")),
        ("`plain-ngram` (seed 1)", "1", ("pn-1", "pn-3", "pn-10")),
        ("`ngram` (seed 1)", "1", ("ngram", "wn-3", "ngram-10")),
    ):
        lines.append([name, *(both(points[arm, seed]) if arm else "" for arm in arms)])
    return rows(["", "1 × the rate", "3 ×", "10 ×"], lines)


@table("mtp/at-1m")
def at_1m() -> str:
    """Write MTP on and off with four segments."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for run in read("mtp/at-1m.json")["arms"]:
        arms.setdefault(run["name"], {})[run["seed"]] = (run.get("decayed") or run["curve"])[-1]

    def spread(values: list[float], sign: str = "") -> str:
        return f"{mean(values):{sign}.3f} ± {stdev(values):.3f}".translate(MINUS)

    lines = []
    for name, found in arms.items():
        less = [point["loss"] - arms["plain"][seed]["loss"] for seed, point in found.items()]
        second = [point["loss_2"] for point in found.values() if point["loss_2"] is not None]
        cells = [spread(less, "+") if name != "plain" else "", spread(second) if second else ""]
        lines.append([f"`{name}`", spread([point["loss"] for point in found.values()]), *cells])
    return rows(["", "next token", "minus plain", "next-2 token"], lines)


@table("parameterisation/runs")
def parameterisation() -> str:
    """Write each candidate beside what it changes."""
    runs = read("parameterisation/runs.json")["runs"]
    loss = {(r["candidate"], r["model"], r["seed"]): r for r in runs}
    lines = []
    for name, model, base in dict.fromkeys((r["candidate"], r["model"], r["against"]) for r in runs):
        seeds = [s for s in range(3) if (name, model, s) in loss and (base or name, model, s) in loss]
        cells = [both(average([loss[name, model, s] for s in seeds]))]
        for key in ("loss", "loss_2"):
            less = [loss[name, model, s][key] - loss[base, model, s][key] for s in seeds] if base else []
            cells.append(with_error(less))
        lines.append([name, model, base or "", " ".join(map(str, seeds)), *cells])
    heads = ["candidate", "model", "against", "seeds", "next / next-2", "difference, next", "difference, next-2"]
    return rows(heads, lines)


@table("stability/runs")
def stability() -> str:
    """Write the range of each measure over the seeds of an arm."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in read("stability/stability.json")["runs"]:
        arms.setdefault(run["arm"], []).append(run)

    def number(value: float) -> str:
        if value < 1000:
            return f"{value:.3g}"
        power = int(f"{value:e}".partition("e")[2])
        return f"{value / 10**power:.2f} · 10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"

    def spread(runs: list[dict[str, Any]], field: str, missing: str = "–") -> str:
        known = [run[field] for run in runs if run[field] is not None]
        ends = list(dict.fromkeys(map(number, (min(known), max(known))))) if known else []
        parts = [" … ".join(ends)] if ends else []
        return "; ".join(parts + ([missing] if len(known) < len(runs) and (not known or missing != "–") else []))

    lines = []
    for arm, runs in arms.items():
        diverged = f"{sum(run['diverged'] for run in runs)} of {len(runs)}"
        fields = ("final_loss", "largest_rise", "gradient_max")
        first = [
            arm.replace("slow", "tenth"),
            diverged,
            f"{runs[0]['learning_rate']:g}",
            *(spread(runs, field) for field in fields),
        ]
        inside = (spread(runs, field) for field in ("spectral_radius", "saturated", "effective_slots"))
        lines.append([*first, spread(runs, "growth", "overflow"), *inside])
    heads = ["arm", "diverged", "rate", "final loss", "largest rise of the loss", "largest gradient norm"]
    heads += ["RMS of the final state over that of the first", "largest spectral radius", "largest saturated share"]
    return rows([*heads, "fewest effective slots"], lines)


def main() -> None:
    """Write or check every table."""
    wrong = []
    for name, make in TABLES.items():
        page = RESULTS / name.split("/")[0] / "README.md"
        text = page.read_text(encoding="utf-8")
        start, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(start)
        _, found, behind = rest.partition(end)
        made = f"{before}{start}{make()}\n{end}{behind}" if found else ""
        if made != text:
            wrong.append(name)
        if not found:
            sys.exit(f"{page}: <!-- table {name} --> and <!-- end {name} --> are missing")
        if "--check" not in sys.argv[1:]:
            page.write_text(made, encoding="utf-8")
    if "--check" in sys.argv[1:] and wrong:
        sys.exit(f"not what the JSON files say: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
