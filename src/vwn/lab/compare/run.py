"""Train the arms of a comparison one after the other, on the same data in the same order, and report."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vwn.common.errors import UserError
from vwn.common.provenance import provenance
from vwn.data import Corpus
from vwn.lab.analysis.analyse import add_analysis
from vwn.lab.analysis.story import read_recorded
from vwn.lab.compare.arms import BASELINE, Arm
from vwn.lab.compare.config import CompareConfig
from vwn.lab.compare.finished import facts, finished_runs
from vwn.lab.compare.models import Sizes, arm_models
from vwn.lab.compare.progress import Progress
from vwn.lab.compare.starts import start_models, write_starts
from vwn.lab.compare.sweep import Losses, first_rates, outcome, sweep, sweep_run
from vwn.lab.report.write import format_table, write_report
from vwn.training import directory
from vwn.training.arguments import check_device, learning_rate_of
from vwn.training.branches import finished
from vwn.training.budgets import format_tokens, parse_tokens
from vwn.training.config import TrainConfig, WidthOptions
from vwn.training.model import load_backbone, record_start
from vwn.training.presets import PRESETS
from vwn.training.result import RunResult, flops_per_token, stored_result
from vwn.training.run import START, check_model, load_corpus, train, with_tokenizer
from vwn.training.trainer import Diverged
from vwn.training.watch.preemption import Stopped


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the comparison; return the report, which is written whenever a run, or a budget of one, has ended.

    An arm that diverges is reported as such and does not keep the others from being trained. With ``resume``, arms,
    seeds and their learning rates may be added; everything else must be as it was.

    Raises:
        UserError: as :func:`vwn.training.run.train`; all arms are checked before the first is trained.
    """
    config.check()
    check_runs(config)
    starts = {} if config.init_from is None else start_models(config.parsed, start_of(config))
    for arm in config.parsed:  # sizes of matched arms follow when the vocabulary is known
        if not starts and not arm.matches and "hidden_scale" not in arm.run:
            size = arm.run.get("hidden_size"), arm.run.get("intermediate_size")
            check_model(config.run(arm, config.seeds[0], size))
    recorded = None if config.recorded is None else read_recorded(Path(config.recorded))
    stored = directory.open_directory(config.out, "compare.json", config.resume)
    text = with_tokenizer(TrainConfig(config.out, init_from=config.init_from, corpus=config.corpus))
    config = dataclasses.replace(config, corpus=text.corpus)
    shared = shared_settings(config)
    if stored is not None:
        directory.check_same(config.out, stored.get("config", {}), shared, "comparison")
        check_same_study(config, stored)
    corpus = load_corpus(text)
    if stored is not None:
        directory.check_same_text(config.out, stored, corpus.fingerprint)
    if starts:
        models = {name: model.config for name, model in starts.items()}
        sizes: dict[str, Sizes] = dict.fromkeys(starts, (None, None))
    else:
        window = config.corpus.window
        backbone = load_backbone(config.backbone, len(corpus.tokenizer), window)
        models, sizes = arm_models(config.parsed, backbone, config.width, window)
    check_runs(config, sizes)
    warn_of_untuned_rates(config)
    with directory.locked(config.out):
        made = provenance()
        record = {**(stored or {"text": corpus.fingerprint, **made}), "config": shared}
        if stored is not None:  # perhaps with more arms, seeds or budgets than before
            record["continued"] = [*stored.get("continued", []), made]
        record["plan"] = plan(config)
        directory.write_json(config.out / "compare.json", record)
        if starts:
            write_starts(starts, config.out / "starts")
            record_start(next(iter(starts.values())), corpus.tokenizer, config.out / START)
        starts.clear()  # every run reads its own
        return Comparison(config, corpus, models, sizes, record).run(recorded)


class Comparison:
    """One comparison under way.

    Args:
        config: what is compared.
        corpus: on which data.
        models: each arm's model config, by name.
        sizes: each arm's hidden and intermediate size, where they are not the backbone's own.
        record: of the comparison, with the commands, versions and machines that it was started and continued with.
    """

    def __init__(
        self,
        config: CompareConfig,
        corpus: Corpus,
        models: dict[str, PreTrainedConfig],
        sizes: dict[str, Sizes],
        record: dict[str, Any],
    ) -> None:
        self.config, self.corpus, self.sizes, self.record = config, corpus, sizes, record
        window = config.corpus.window
        self.progress = Progress({name: flops_per_token(model, window) or 1.0 for name, model in models.items()})
        self.swept = {a.name for a in config.parsed if config.sweeps and a.name not in config.rates}

    def run(self, recorded: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sweep, train and report; return the report.

        With budgets, all arms and seeds are trained to the first, then all to the next, and so on.

        Args:
            recorded: of :func:`vwn.lab.analysis.story.read_recorded`, for the report.
        """
        config = self.config
        for arm in config.parsed:
            if arm.name in self.swept:
                run = sweep_run(config, self._measured(arm, config.seeds[0]), arm.name, 1.0)
                self.progress.plan(arm.name, run.optim.steps * len(first_rates(config, 1.0)))
            self.progress.plan(arm.name, self._measured(arm, config.seeds[0]).planned_steps * len(config.seeds))
        sweeps = [self._rate(arm) for arm in config.parsed]
        rates = {entry["arm"]: entry["best"] for entry in sweeps}
        about = {**facts(config, self.record), "config": describe(config, self.corpus), "sweep": sweeps}
        about |= {"recorded": recorded} if recorded else {}

        def written() -> dict[str, Any]:
            report = add_analysis({**about, "arms": finished_runs(config)})
            if report["arms"]:
                write_report(report, config.out)
            return report

        runs = [(arm, seed) for seed in config.seeds for arm in config.parsed]
        left = []
        for budgets in range(1, 1 + max(1, len(config.optim.budgets))):
            for number, (arm, seed) in enumerate(runs, 1):
                run = with_rate(self._measured(arm, seed), rates[arm.name])
                steps = steps_of_round(run, budgets)
                if has_ended(run, budgets):
                    self.progress.skip(arm.name, steps)
                else:
                    label = f"[{number}/{len(runs)}] {arm.name} seed {seed}"
                    left.append(partial(self._train, arm.name, run, steps, label, budgets))
        report = written()
        for train_more in left:
            train_more()
            report = written()
        print(format_table(report))
        print(f"\nreport: {config.out / 'report.html'}")
        return report

    def _measured(self, arm: Arm, seed: int) -> TrainConfig:
        return self.config.run(arm, seed, self.sizes[arm.name])

    def _rate(self, arm: Arm) -> dict[str, Any]:
        measured = self._measured(arm, self.config.seeds[0])
        start = start_rate(self.config, measured)
        if arm.name not in self.swept:
            return {"arm": arm.name, "rates": [], "best": start, "bracketed": False}
        planned = set(first_rates(self.config, start))

        def final_loss(rate: float) -> Losses:
            run = sweep_run(self.config, measured, arm.name, rate)
            if rate not in planned:
                self.progress.plan(arm.name, run.optim.steps)
            result = self._train(arm.name, run, run.optim.steps, f"[sweep] {arm.name} rate {rate:.3g}")
            for path in (*run.out.glob("checkpoint-*"), *run.out.glob("*.safetensors")):  # only the result is of use
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return outcome(result, run.width.mtp_loss_weight)

        return sweep(self.config, arm, start, final_loss)

    def _train(self, name: str, run: TrainConfig, steps: int, label: str, budgets: int | None = None) -> RunResult:
        """Train a run, or so many of its budgets; return its result, also if it diverged or had ended before.

        Args:
            name: of the arm.
            run: its configuration.
            steps: that are counted as done at the end.
            label: of the progress bar.
            budgets: how many of its budgets are trained now, by default all.
        """
        taken = 0

        def shown(so_far: int) -> str:
            nonlocal taken
            self.progress.take(name, so_far - taken)
            taken = so_far
            return f"{label} ({self.progress.text()})"

        try:
            result = train(dataclasses.replace(run, resume="auto"), self.corpus, shown, budgets)
        except Stopped:
            if (self.config.out / "report.html").exists():
                print(f"vwn: what has ended is in {self.config.out / 'report.html'}", file=sys.stderr)
            raise
        except Diverged as diverged:
            print(f"vwn: {label}: {diverged}", file=sys.stderr)
            directory.write_json(run.out / "result.json", dataclasses.asdict(diverged.result))
            result = diverged.result
        self.progress.skip(name, steps - taken)  # an earlier process took them, or the run diverged before
        return result


def start_of(config: CompareConfig) -> str:
    """Return the trained model that the arms start from: the plain one kept here, else what --init-from names."""
    kept = [config.out / "starts" / arm.name for arm in config.parsed if arm.is_plain and not arm.matches]
    return str(next((folder for folder in kept if folder.exists()), config.init_from))


def with_rate(run: TrainConfig, rate: float) -> TrainConfig:
    """Return a run at another learning rate."""
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, learning_rate=rate))


def has_ended(run: TrainConfig, budgets: int) -> bool:
    """Return whether a run has been trained to the end that it has now, or so many of its budgets have."""
    result = stored_result(run.out) if budgets >= len(run.branches) else finished(run.out)
    return result is not None and result.is_whole(run, budgets)


def steps_of_round(run: TrainConfig, budgets: int) -> int:
    """Count the optimiser steps from where the branch of the budget before leaves the trunk to the end of this one."""
    if not run.branches:
        return run.optim.steps
    return run.branches[budgets - 1].steps - (run.branches[budgets - 2].leaves if budgets > 1 else 0)


def check_same_study(config: CompareConfig, stored: dict[str, Any]) -> None:
    """Refuse to turn a study into another one; a comparison by hand may become one."""
    study = stored.get("plan", {}).get("study")
    if study not in (None, config.study):
        raise UserError(
            f"{config.out} holds the study {study!r}, not {config.study!r}; name it, add single arms with --arms, or "
            "choose another --out"
        )


def check_runs(config: CompareConfig, sizes: dict[str, Sizes] | None = None) -> None:
    """Refuse what no arm could be trained with or, with ``sizes``, not be continued with."""
    for arm in config.parsed:
        for seed in config.seeds:
            run = config.run(arm, seed, (sizes or {}).get(arm.name, (None, None)))
            check_device(run.speed, run.n)
            try:
                with_rate(run, start_rate(config, run)).check()
            except UserError as error:
                raise UserError(f"arm {arm.name}: {error}") from error
            path = run.out / "run.json"
            if sizes and path.exists():
                asked = directory.settings(run)
                if run.optim.learning_rate is None:  # swept, or the preset's
                    del asked["optim.learning_rate"]
                directory.check_same(run.out, directory.read_json(path).get("config", {}), asked, "arm")


def start_rate(config: CompareConfig, run: TrainConfig) -> float:
    """Return the rate of a run, or where the sweep of its arm begins; refuse a run for which none is known."""
    if config.sweeps and config.sweep.sweep_rates and run.optim.learning_rate is None:
        return min(config.sweep.sweep_rates)
    if run.optim.learning_rate is None and (run.init_from or (config.sweeps and run.backbone not in PRESETS)):
        model = config.init_from or f"the backbone {run.backbone!r}"
        needed = "--sweep-rates is" if config.sweeps else "--learning-rate is"
        raise UserError(f"{needed} needed: no learning rate is known for {model}")
    return learning_rate_of(run)


def plan(config: CompareConfig) -> dict[str, Any]:
    """Return what a resumed comparison goes on with, and may add to."""
    return {
        "study": config.study,
        "arms": list(config.arms),
        "seeds": list(config.seeds),
        "learning_rates": list(config.learning_rates),
        "learning_rate": config.optim.learning_rate,
        "recorded": config.recorded,
        "sweep": dataclasses.asdict(config.sweep),
    }


def shared_settings(config: CompareConfig) -> dict[str, Any]:
    """Return everything that all arms have in common, by dotted name."""
    width = config.width if config.init_from is None else WidthOptions()  # else the model decides it
    own: Any = {"width": width, "speed": config.speed, "optim": config.optim}
    arm = dataclasses.replace(config.run(Arm(BASELINE), 0), **own, init_from=config.init_from)
    differing = ("m", "n", "hidden_size", "intermediate_size", "seed", "optim.learning_rate")
    return {k: v for k, v in directory.settings(arm).items() if k not in differing and not k.startswith("reliability.")}


def warn_of_untuned_rates(config: CompareConfig) -> None:
    """Name the arms whose rates were not tuned: an arm at a rate that suits another says nothing about the arm."""
    untuned = [arm.name for arm in config.parsed if arm.name not in config.rates]
    given = config.optim.learning_rate is not None
    tuned = len(untuned) == 1 if given else config.backbone in PRESETS and PRESETS[config.backbone].swept
    if untuned and not tuned and not config.sweeps:
        print(
            f"vwn: the learning rates of {', '.join(untuned)} are {'one for all' if given else 'a rule of thumb'}; "
            "tune each arm (--lr-sweep on) before you trust the comparison",
            file=sys.stderr,
        )


def describe(config: CompareConfig, corpus: Corpus) -> dict[str, Any]:
    """Return what all arms have in common, for the report; ``steps`` are those of the largest budget."""
    trained = config.run(config.parsed[0], config.seeds[0])
    return {
        **{name.split(".")[-1]: value for name, value in shared_settings(config).items()},
        "steps": trained.branches[-1].steps if trained.branches else trained.optim.steps,
        "arms": [arm.name for arm in config.parsed],
        "seeds": list(config.seeds),
        "train_tokens": corpus.train_tokens,
        "valid_tokens": corpus.valid_tokens,
        "vocabulary": len(corpus.tokenizer),
        "valid_bytes_per_token": corpus.valid_bytes_per_token,
    }


def adopt(config: CompareConfig, given: Set[str]) -> CompareConfig:
    """Return the comparison to resume: the stored one, but for options that were ``given``; arms and seeds add up."""
    path = config.out / "compare.json"
    if not config.resume or not path.exists():
        return config
    record = directory.read_json(path)
    stored, planned = record.get("config", {}), record.get("plan", {})
    parts: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            kept = {k.split(".")[1]: v for k, v in stored.items() if k.startswith(f"{f.name}.")}
            kept |= planned.get(f.name, {})
            known = {o.name: kept[o.name] for o in dataclasses.fields(value) if o.name in kept}
            known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}  # JSON has no tuples
            written = [*known.get("budgets", ()), *getattr(value, "budgets", ())]
            budgets = tuple(dict.fromkeys(format_tokens(parse_tokens(text)) for text in written))  # 800k is 0.8M
            known = {k: v for k, v in known.items() if k not in given} | ({"budgets": budgets} if budgets else {})
            parts[f.name] = dataclasses.replace(value, **known)  # type: ignore
        elif f.name in ("arms", "seeds", "learning_rates"):
            asked = getattr(config, f.name) if f.name in given else ()
            before = planned.get(f.name, [])
            if f.name == "learning_rates":  # a new rate of an arm takes the place of its old one
                before = [item for item in before if item.split("=")[0] not in {new.split("=")[0] for new in asked}]
            parts[f.name] = tuple(dict.fromkeys([*before, *asked]))
        elif f.name not in given and f.name in stored | planned:
            parts[f.name] = (stored | planned)[f.name]
    if "learning_rate" not in given and "learning_rate" in planned:
        parts["optim"] = dataclasses.replace(parts["optim"], learning_rate=planned["learning_rate"])
    return dataclasses.replace(config, **parts)
