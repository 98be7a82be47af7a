"""A plain backbone against virtual widths, from Python: python examples/compare_arms.py TEXT OUT."""

import argparse
from pathlib import Path

from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.run import compare
from vwn.training.config import CorpusConfig, OptimConfig, WidthOptions


def main() -> None:
    """Train two arms with each seed and print what the differences allow to say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", default=["plain", "4x16"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-2, help="for all arms; a study sweeps each arm's own")
    for name, default in {"steps": 200, "batch-size": 8, "window": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    config = CompareConfig(
        out=given.out,
        arms=tuple(given.arms),
        backbone="nano",
        seeds=tuple(given.seeds),
        corpus=CorpusConfig(data=str(given.text), window=given.window, max_valid_tokens=16_384),
        width=WidthOptions(mtp=1, reduce="sum"),
        optim=OptimConfig(steps=given.steps, batch_size=given.batch_size, learning_rate=given.rate),
    )
    report = compare(config)

    for arm in report["summary"]:
        if not arm["is_baseline"]:
            gap = arm["loss"]["difference"]
            print(f"{arm['name']}: {gap['mean']:+.3f} nats per token against {report['baseline']}, {gap['n']} seeds")


if __name__ == "__main__":
    main()
