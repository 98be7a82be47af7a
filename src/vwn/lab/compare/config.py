"""Options of a comparison: arms, seeds, the sweep of learning rates, and everything that the arms have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, Literal

from vwn.common.errors import UserError, require
from vwn.lab.compare.arms import BASELINE, Arm, check_arms, check_start_options, parse_arm
from vwn.lab.compare.studies import STUDIES
from vwn.training.config import (
    CorpusConfig,
    OptimConfig,
    OutputInit,
    ReliabilityOptions,
    SpeedOptions,
    TrainConfig,
    WidthOptions,
)


@dataclass(frozen=True)
class SweepOptions:
    """Options of the sweep that finds each arm's learning rate before the measured runs."""

    lr_sweep: Literal["auto", "on", "off"] = "auto"
    """Sweep the learning rate of each arm that none was given for; `auto`: in a --study."""
    sweep_rates: tuple[float, ...] = ()
    """Rates that each arm starts with, at least three; by default half, once and twice the preset's."""
    sweep_steps: int | None = None
    """Optimiser steps of a sweep's run; by default half of --steps, or the smallest of the --budgets. Much shorter ones
    favour rates too high."""
    sweep_seed: int = 1000
    """Seed of the sweep's runs, none of the --seeds."""
    sweep_extensions: int = 3
    """Times that a sweep whose best rate lies at its edge may be continued beyond it."""

    def check(self, seeds: tuple[int, ...]) -> None:
        """Refuse what no sweep can do."""
        require(self.sweep_steps is None or self.sweep_steps >= 1, "sweep-steps", "at least 1", self.sweep_steps)
        require(self.sweep_extensions >= 0, "sweep-extensions", "0 or more", self.sweep_extensions)
        rates = self.sweep_rates
        if rates and (len(set(rates)) < 3 or not all(0 < rate < inf for rate in rates)):
            raise UserError(f"--sweep-rates takes three or more different positive rates; got {rates}")
        if self.sweep_seed in seeds:
            raise UserError(f"--sweep-seed {self.sweep_seed} is one of the --seeds; a sweep takes another")


DEFAULT_WIDTH = WidthOptions(mtp=1)


@dataclass(frozen=True)
class CompareConfig:
    """Train several models that differ in one thing, and write a report."""

    out: Path
    """Directory of the comparison; it must not exist yet, unless --resume."""
    study: str | None = None
    """Arms that answer one question: widths, fraction-rate, mtp, family, embedding, controls or widen."""
    arms: tuple[str, ...] = ()
    """Arms, besides the study's, as `[NAME:]WIDTH[,OPTION=VALUE...]` with WIDTH `plain` (the untouched backbone) or
    `MxN`, such as `4x16` or `hc:1x4,connection=hc`; without a study `plain 4x16`."""
    backbone: str = "tiny"
    """A preset, a transformers config (file or folder), or a hub id."""
    init_from: str | None = None
    """Let all arms go on from a trained plain model (a folder, a checkpoint of a training run, or a hub id): `plain` as
    it is, an `MxN` arm widened, an arm with match_params with wider FFNs. They compute the same at first."""
    output_init: OutputInit | None = None
    """Start of the last matrix of every attention and FFN, as in `vwn train`."""
    seeds: tuple[int, ...] = (0,)
    """Each arm is trained once for each seed; arms of one seed share data order and backbone initialisation."""
    learning_rates: tuple[str, ...] = ()
    """Peak learning rates of single arms, as `ARM=RATE`; the others are swept, or take --learning-rate or the
    preset's."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    width: WidthOptions = field(default_factory=lambda: DEFAULT_WIDTH)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    eval_every: int | None = None
    """Steps between validations; by default 5 % of all."""
    save_every: int | None = None
    """Steps between checkpoints; by default 10 % of all."""
    recorded: str | None = None
    """Folder of an earlier comparison of the same budget (with its report.json), which the report compares this one
    with."""
    resume: bool = False
    """Continue the comparison in --out, or start it; finished arms are not repeated, arms and seeds may be added."""

    def check(self) -> None:
        """Refuse what no comparison can do, before anything is read or written."""
        if self.study is not None and self.study not in STUDIES:
            raise UserError(f"--study must be one of {', '.join(STUDIES)}; got {self.study!r}")
        check_arms(self.parsed)
        self._check_start()
        if self.corpus.stream:
            raise UserError(
                "a comparison trains all arms on prepared text; give --data, and leave --stream to vwn train"
            )
        if not self.seeds:
            raise UserError("--seeds needs at least one value")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds names a seed twice: {' '.join(map(str, self.seeds))}")
        self.sweep.check(self.seeds)
        unknown = set(self.rates) - {arm.name for arm in self.parsed}
        if unknown:
            raise UserError(f"--learning-rates names {', '.join(sorted(unknown))}, which is not among the arms")

    def _check_start(self) -> None:
        if self.init_from is None:
            if self.study == "widen":
                raise UserError("--study widen needs --init-from: a trained plain model, or a checkpoint-N of its run")
            return
        given = {
            "--backbone": self.backbone != CompareConfig.backbone,
            "--output-init": self.output_init is not None,
            "the options of a width": self.width not in (DEFAULT_WIDTH, WidthOptions()),
        }
        if options := [name for name, is_given in given.items() if is_given]:
            raise UserError(f"--init-from {self.init_from} decides the model; drop {', '.join(options)}")
        check_start_options(self.parsed)

    @cached_property
    def parsed(self) -> tuple[Arm, ...]:
        """The study's arms, then the others; one that is named again exactly as it was counts once."""
        of_study = STUDIES[self.study].arms if self.study in STUDIES else ()
        words = [*of_study, *(word for word in self.arms if word not in of_study)]
        return tuple(map(parse_arm, words or (BASELINE, "4x16")))

    @property
    def baseline(self) -> str:
        """The arm that the others are held against: `plain`, else the first plain one, else `plain` all the same."""
        plain = [arm.name for arm in self.parsed if arm.is_plain]
        return BASELINE if BASELINE in plain or not plain else plain[0]

    @property
    def sweeps(self) -> bool:
        """Return whether arms without a rate of their own are swept."""
        if self.sweep.lr_sweep == "auto":
            return self.study is not None and self.optim.learning_rate is None
        return self.sweep.lr_sweep == "on"

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates given for single arms, in their own words or by --learning-rates."""
        rates = {arm.name: arm.run["learning_rate"] for arm in self.parsed if "learning_rate" in arm.run}
        for item in self.learning_rates:
            arm, _, rate = item.rpartition("=")
            try:
                rates[arm] = float(rate)
            except ValueError:
                raise UserError(f"--learning-rates takes ARM=RATE, such as 4x16=0.003; got {item!r}") from None
        return rates

    def run(self, arm: Arm, seed: int, sizes: tuple[int | None, int | None] = (None, None)) -> TrainConfig:
        """Return the training run of one arm and seed.

        Args:
            arm: one of :attr:`parsed`.
            seed: of initialisation and data order.
            sizes: hidden and intermediate size of its backbone, where they are not the backbone's own.
        """
        rate = self.rates.get(arm.name, self.optim.learning_rate)
        factors = arm.run.get("rate_factors")
        optim = dataclasses.replace(self.optim, learning_rate=rate)
        model: dict[str, Any] = {
            "backbone": self.backbone,
            "m": arm.m,
            "n": arm.n,
            "hidden_size": sizes[0],
            "intermediate_size": sizes[1],
            "output_init": arm.run.get("output_init", self.output_init),
            "width": arm.options(self.width),
        }
        if self.init_from is not None:
            model = {"init_from": str(self.out / "starts" / arm.name)}
        return TrainConfig(
            **model,
            out=self.out / "arms" / f"{arm.name}-seed{seed}",
            seed=seed,
            corpus=self.corpus,
            optim=optim if factors is None else dataclasses.replace(optim, rate_factors=tuple(factors.split("+"))),
            speed=self.speed if not arm.is_plain else self.speed.for_plain_model,
            eval_every=self.eval_every,
            save_every=self.save_every,
            reliability=ReliabilityOptions(skip_bad_steps=0),  # an arm that diverges is not to be helped
            resume=self.resume,
        )
