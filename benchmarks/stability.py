"""What became of a comparison's runs: growth of the state and of the gradients, routing, divergence.

Reads the runs of `vwn compare` (their curves and health.jsonl); writes a table, `stability.json` and two figures.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vwn.training.directory import read_json, write_json
from vwn.training.watch.health import read_health

DIVERGED = 1.0
"""Nats by which the last validation loss is above the lowest where a run counts as diverged."""
LABELS = {
    "loss": "validation loss, nats",
    "gradient": "gradient norm",
    "final_rms": "RMS of the final state",
    "spectral_radius": "largest spectral radius",
    "effective_slots": "fewest effective slots",
    "saturated": "largest saturated share",
}


def series(run: Path) -> dict[str, list[tuple[int, float | None]]]:
    """Each quantity over the steps of one run."""
    health = read_health(run)
    tokens_per_step = health[0]["tokens"] // health[0]["step"]
    curve = read_json(run / "result.json")["curve"]
    found: dict[str, list[tuple[int, float | None]]] = {
        "loss": [(p["tokens"] // tokens_per_step, p["loss"]) for p in curve],
        "gradient": [(h["step"], h["gradient_norm"].get("total")) for h in health],
        "final_rms": [(h["step"], h["state"]["rms"][-1]) for h in health],
        "growth": [(h["step"], _ratio(h["state"]["rms"][-1], h["state"]["rms"][0])) for h in health],
    }
    for name, pick in (("spectral_radius", max), ("saturated", max), ("effective_slots", min), ("weakest_slot", min)):
        rows = [(h["step"], [v for v in h["state"].get(name, ()) if v is not None]) for h in health]
        found[name] = [(step, pick(values)) for step, values in rows if values]
    return found


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def outcome(run: Path) -> dict[str, Any]:
    """One run in numbers: its losses, whether it diverged or spiked, and its state and gradients at the end."""
    seen = series(run)
    losses = [loss for _, loss in seen["loss"]]
    lowest, rise = math.inf, 0.0
    for loss in losses:
        if loss is None:
            break
        lowest, rise = min(lowest, loss), max(rise, loss - lowest)
    last = read_health(run)[-1]["gradient_norm"]
    norms = [g for step, g in seen["gradient"] if g is not None and step > 1]
    return {
        "arm": run.name.rpartition("-seed")[0],
        "seed": int(run.name.rpartition("-seed")[2]),
        "learning_rate": read_json(run / "result.json")["learning_rate"],
        "final_loss": losses[-1],
        "lowest_loss": lowest,
        "diverged": losses[-1] is None or losses[-1] > lowest + DIVERGED,
        "largest_rise": rise,
        "gradient_median": median(norms[len(norms) // 2 :]),
        "gradient_max": max(norms),
        "gradient_of_first_over_last_layer": _ratio(last["layers"][0], last["layers"][-1]),
        "final_rms": seen["final_rms"][-1][1],
        "growth_at_start": seen["growth"][0][1],
        "growth": seen["growth"][-1][1],
        **{name: (seen[name][-1][1] if seen[name] else None)
           for name in ("spectral_radius", "saturated", "effective_slots", "weakest_slot")},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Lowest to highest over seeds, an arm a line, as Markdown: the runs of an arm may end quite differently."""
    columns = {
        "learning_rate": "rate", "final_loss": "final loss", "largest_rise": "largest rise of the loss",
        "gradient_max": "largest gradient norm", "growth": "RMS of the final state over that of the first",
        "spectral_radius": "largest spectral radius", "saturated": "largest saturated share",
        "effective_slots": "fewest effective slots",
    }  # fmt: skip
    head = ["arm", "diverged", *columns.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = [arm, f"{sum(row['diverged'] for row in of_arm)} of {len(of_arm)}"]
        for key in columns:
            values = sorted(row[key] for row in of_arm if row[key] is not None)
            shown = list(dict.fromkeys(f"{value:.3g}" for value in values))
            beyond = "; overflow" if key == "growth" and 0 < len(values) < len(of_arm) else ""
            empty = "overflow" if key == "growth" and any(row["diverged"] for row in of_arm) else "–"
            cells.append((" … ".join([shown[0], shown[-1]][: len(shown)]) if shown else empty) + beyond)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: list[Path], out: Path) -> None:
    """Every quantity over the steps, a line for each run; and the last state's RMS and gradient by depth."""
    arms = list(dict.fromkeys(run.name.rpartition("-seed")[0] for run in runs))
    colours = dict(zip(arms, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (name, label) in zip(axes.flat, LABELS.items(), strict=True):
        for run in runs:
            arm = run.name.rpartition("-seed")[0]
            points = [(x, y) for x, y in series(run)[name] if y]  # nothing at 0 on a logarithmic axis
            label_once = arm if run.name.endswith(f"-seed{_first_seed(runs)}") and name == "loss" else None
            if points:
                axis.plot(*zip(*points, strict=True), color=colours[arm], lw=1, alpha=0.8, label=label_once)
        axis.set(xlabel="step", title=label)
        if name in ("gradient", "final_rms"):
            axis.set_yscale("log")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(out / "over-steps.png", dpi=150)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for run in runs:
        arm, last = run.name.rpartition("-seed")[0], read_health(run)[-1]
        label_once = arm if run.name.endswith(f"-seed{_first_seed(runs)}") else None
        rms, layers = last["state"]["rms"], last["gradient_norm"]["layers"]
        left.plot([2 * len(layers) * i / len(rms) for i in range(len(rms))], rms, color=colours[arm], label=label_once)
        right.plot(range(1, len(layers) + 1), layers, color=colours[arm])
    left.set(xlabel="sublayer", title="RMS of the state at the last step", yscale="log")
    right.set(xlabel="layer", title="gradient norm of the layer at the last step", yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(out / "over-depth.png", dpi=150)


def _first_seed(runs: list[Path]) -> str:
    return runs[0].name.rpartition("-seed")[2]


def main() -> None:
    """Summarise the comparison in DIR into OUT."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.stability", description=(__doc__ or "").split("\n")[0])
    options.add_argument("comparison", type=Path, metavar="DIR", help="the --out of a finished vwn compare")
    options.add_argument("out", type=Path, metavar="OUT", help="folder for stability.json and the figures")
    chosen = options.parse_args()
    record = read_json(chosen.comparison / "compare.json")
    order = [str(word).partition(":")[0] for word in record["plan"]["arms"]]
    runs = sorted(
        (run for run in (chosen.comparison / "arms").iterdir() if (run / "result.json").exists()),
        key=lambda run: (order.index(run.name.rpartition("-seed")[0]), run.name),
    )
    if not runs:
        raise SystemExit(f"{chosen.comparison} holds no finished run")
    rows = [outcome(run) for run in runs]
    chosen.out.mkdir(parents=True, exist_ok=True)
    made_with = {key: record.get(key) for key in ("created", "versions", "machine")}
    commands = [record["command"], *(again["command"] for again in record.get("continued", []))]
    write_json(chosen.out / "stability.json", {"commands": commands, **made_with, "runs": rows})
    draw(runs, chosen.out)
    print(table(rows))


if __name__ == "__main__":
    main()
