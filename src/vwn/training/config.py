"""Typed options of a training run, from which the command line is made; a run checks them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from vwn.common.errors import UserError, require
from vwn.training.budgets import Branch, branches_of, decay_steps, parse_tokens

OutputInit = Literal["zero", "depth", "config"]


@dataclass(frozen=True)
class CorpusConfig:
    """Options of the text and its tokens."""

    data: str = "stdlib"
    """Training text: `stdlib` (the Python standard library's sources), a .txt, .jsonl (also .xz, .gz or .zst) or
    .parquet file, a folder of them, or a hub id."""
    valid: str | None = None
    """Validation text; without it a part of the training text is held out."""
    stream: tuple[str, ...] = ()
    """Training text in place of --data that is read, tokenised and packed while the model trains: files, folders,
    patterns (`shards/*.parquet`) or hub ids, each with `=WEIGHT` for its share of the tokens. Needs --valid."""
    tokenizer: str | None = None
    """`bytes` (the default), `bpe:SIZE` (trained on the corpus), a path, or a hub id."""
    control_tokens: bool = False
    """Give control tokens that are written in the text (`<|im_start|>`, `</s>`) their ids; otherwise they are text."""
    window: int = 256
    """Tokens per training example."""
    max_valid_tokens: int = 131_072
    """Validation tokens used, evenly spread over the validation text."""
    skip_bad_rows: int = 0
    """Unreadable streamed rows that each process may skip, and log, before it stops."""
    workers: int = 0
    """Processes that read ahead for each training process; any number gives the same batches."""

    def check(self) -> None:
        """Refuse what no run can do."""
        _at_least(self, 2, "window")
        _at_least(self, 1, "max_valid_tokens")
        _at_least(self, 0, "workers", "skip_bad_rows")
        if self.skip_bad_rows and not self.stream:
            raise UserError("--skip-bad-rows goes with --stream; drop it, or repair the rows of --data")
        if self.stream and self.data != CorpusConfig.data:
            raise UserError(f"--stream takes the place of --data; give one of them, not --data {self.data} too")


@dataclass(frozen=True)
class WidthOptions:
    """Options of a virtual width, whatever its size, and of multi-token prediction, which plain models have too."""

    mtp: int = 0
    """Multi-token prediction modules (num_mtp_modules in Python); 1 also predicts the next token but one."""
    mtp_loss_weight: float = 0.3
    """Weight of each further token's loss."""
    connection: Literal["ghc", "hc", "mhc"] = "ghc"
    """Connection between sublayers: Generalized Hyper-Connections (virtual width), Hyper-Connections (with n = m
    Frac-Connections), or manifold-constrained Hyper-Connections (m = 1)."""
    carry_constraint: Literal["none", "identity", "doubly_stochastic"] = "none"
    """Constraint on the carry matrix of `ghc`; `identity` keeps it where it starts."""
    static: bool = False
    """Static routing matrices instead of token-dependent ones (dynamic=False in Python)."""
    embedding: Literal["direct", "factorised", "replicated"] | None = None
    """Form of the over-width embedding; by default direct, and replicated for hc and mhc."""
    reduce: Literal["linear", "sum", "identity"] | None = None
    """Form of the reduce; by default identity where n = m, else linear, and sum for hc and mhc."""
    reduce_norm: Literal["group_norm", "rms_norm", "none"] | None = None
    """Norm in front of the linear reduce; by default the paper's choice."""
    reduce_init: Literal["first_slots", "normal"] = "first_slots"
    """Initial linear reduce: the plain residual stream, or random."""
    ngram_order: int = 1
    """Longest n-gram whose hashed embedding is added to the token's; 1 adds none. Plain models have it too."""
    ngram_buckets: int = 0
    """Rows of the table of each order of n-grams."""
    table_factor: int = 1
    """Plain models: embedding and unembedding so many times wider than the backbone, each with a linear layer."""

    def check(self) -> None:
        """Refuse what no run can do."""
        _at_least(self, 0, "mtp", "mtp_loss_weight")
        _at_least(self, 1, "ngram_order", "table_factor")
        if (self.ngram_order > 1) != (self.ngram_buckets > 0):
            raise UserError(
                "--ngram-order above 1 and --ngram-buckets above 0 go together; "
                f"got {self.ngram_order} and {self.ngram_buckets}"
            )

    @property
    def shape(self) -> WidthOptions:
        """Return the options that only a width has a use for."""
        return replace(self, **{name: getattr(WidthOptions(), name) for name in PLAIN_OPTIONS})

    @property
    def for_plain_model(self) -> WidthOptions:
        """Return the options that a plain model has a use for."""
        return WidthOptions(**{name: getattr(self, name) for name in PLAIN_OPTIONS})


PLAIN_OPTIONS = ("mtp", "mtp_loss_weight", "ngram_order", "ngram_buckets", "table_factor")


@dataclass(frozen=True)
class OptimConfig:
    """The budget, the optimiser and the schedule of its learning rate."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Windows per optimiser step, over all processes."""
    learning_rate: float | None = None
    """Peak learning rate; by default the preset's, for plain and wide models separately."""
    rate_factors: tuple[str, ...] = ()
    """Learning rates of single parameter groups as `GROUP=FACTOR` of the peak rate, such as `routing=0.3`; groups are
    backbone, table, expansion, routing, reduce and head. By default table=10 where its rows start at unit variance,
    as a preset's do, reduce=0.1 for a linear one, and routing=5/L in a model of L > 8 sublayers with free carries."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: torch's Muon for the backbone's matrices, AdamW for everything else; one learning rate suits both."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default 5 % of all, or of the smallest of the --budgets."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """What follows the warm-up: a cosine down to --final-learning-rate, the peak rate to the end (constant), or the
    peak rate and at the end a linear cool-down (wsd)."""
    cooldown: float = 0.2
    """Share of a wsd run, or of each of its --budgets, that is the cool-down."""
    budgets: tuple[str, ...] = ()
    """With wsd: the losses after so many tokens each, such as `1M 2M 4M`, in place of --steps. One trunk is trained at
    the peak rate; for each budget a branch leaves it, in OUT/branches, and cools down. --resume may add larger ones."""
    final_learning_rate: float = 0.1
    """Learning rate at the end of a cosine or a cool-down, as a share of the peak."""
    weight_decay: float = 0.1
    """Decay of everything but biases, norm gains and the static routing matrices."""
    beta1: float = 0.9
    """Adam's share of the earlier mean of gradients in the new one."""
    beta2: float = 0.95
    """Adam's share of the earlier mean of squared gradients in the new one."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_accumulation: int = 1
    """Forward passes that a batch is split into."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on a GPU that has it, else fp32."""

    def check(self) -> None:
        """Refuse what no run can do."""
        _at_least(self, 1, "steps", "batch_size", "gradient_accumulation")
        _at_least(self, 0, "weight_decay", "max_grad_norm", "warmup_steps")
        from vwn.training.arguments import parse_factors  # it needs torch, and --help does not

        parse_factors(self.rate_factors)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        require(0 <= self.final_learning_rate <= 1, "final-learning-rate", "from 0 to 1", self.final_learning_rate)
        require(0 < self.cooldown < 1, "cooldown", "above 0 and below 1", self.cooldown)
        if self.schedule != "wsd" and self.cooldown != OptimConfig.cooldown:
            raise UserError(f"--cooldown goes with --schedule wsd; drop it with {self.schedule}")
        if self.budgets:
            self._check_budgets()
        else:
            require(
                (self.warmup_steps or 0) <= self.steps, "warmup-steps", f"from 0 to {self.steps}", self.warmup_steps
            )
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"--gradient-accumulation {self.gradient_accumulation} must divide --batch-size {self.batch_size}"
            )
        if self.learning_rate is not None:
            require(0 < self.learning_rate < inf, "learning-rate", "positive", self.learning_rate)

    def _check_budgets(self) -> None:
        if self.schedule != "wsd":
            raise UserError(f"--budgets are cool-downs of one trunk; use --schedule wsd with them, not {self.schedule}")
        if self.steps != OptimConfig.steps:
            raise UserError(f"--budgets says how long to train; drop --steps {self.steps}")
        for text in self.budgets:
            parse_tokens(text)


@dataclass(frozen=True)
class SpeedOptions:
    """Options of speed and memory; the losses differ by rounding at most."""

    connection_backend: Literal["auto", "reference", "compiled", "triton"] = "auto"
    """Implementation of the connections: C++ on a CPU, Triton on a GPU; `auto` takes the fastest and logs it."""
    keep_states_every: int = 1
    """Keep one over-width state in this many sublayers for the backward pass and rebuild the others."""
    loss_backend: Literal["auto", "torch", "chunked", "liger"] = "auto"
    """`chunked` and `liger` keep no logits; `auto`: the one on a CPU where it pays, the other on a GPU that has it."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""
    compile: bool = False
    """Run the model through torch.compile."""

    def check(self) -> None:
        """Refuse what no run can do."""
        _at_least(self, 1, "keep_states_every")
        for name in ("gradient_checkpointing", "compile"):
            if self.keep_states_every > 1 and getattr(self, name):
                raise UserError(f"--keep-states-every does not go with --{name.replace('_', '-')}; use one of them")

    @property
    def for_plain_model(self) -> SpeedOptions:
        """Return the options that a plain model has a use for."""
        return replace(self, connection_backend="auto", keep_states_every=1)


@dataclass(frozen=True)
class ReliabilityOptions:
    """Options of checkpoints, bad steps and waiting; they may be changed when a run is resumed."""

    keep_last: int = 2
    """Checkpoints to keep; an old one is deleted when a newer one is complete."""
    skip_bad_steps: int = 3
    """Steps among the last 100 that may be skipped, because their loss or gradient was not finite or a spike, before
    the run stops; 0 stops at the first."""
    spike_factor: float = 0.0
    """Skip a step whose loss or gradient norm is so many robust standard deviations above the median of the last 128;
    0 skips only what is not finite."""
    distributed_timeout: float = 30.0
    """Minutes after which a process that does not answer counts as lost, if there are several."""

    def check(self) -> None:
        """Refuse what no run can do."""
        _at_least(self, 1, "keep_last")
        _at_least(self, 0, "spike_factor")
        require(0 <= self.skip_bad_steps < 100, "skip-bad-steps", "from 0 to 99", self.skip_bad_steps)
        require(0 < self.distributed_timeout < inf, "distributed-timeout", "positive", self.distributed_timeout)


@dataclass(frozen=True)
class TrainConfig:
    """Train one model on text, plain or with virtual width."""

    out: Path
    """Run directory; it must not exist yet, unless --resume."""
    backbone: str = "tiny"
    """A preset (micro, nano, tiny, small, medium, large, xl, tiny-moe), or a transformers config (file, folder or hub
    id): its sizes only; the weights start new. --init-from starts from weights."""
    init_from: str | None = None
    """Train on from these weights, plain or widened (`vwn widen`): a folder or a hub id. It decides sizes, width and,
    without --tokenizer, the tokenizer."""
    m: int | None = None
    """Fraction rate: the backbone's width is cut into m segments. Without --m and --n the plain backbone is trained."""
    n: int | None = None
    """Slots of the over-width state; the virtual width factor is r = n/m."""
    hidden_size: int | None = None
    """Another width of the backbone; heads keep their size."""
    intermediate_size: int | None = None
    """Width of its FFNs; by default in proportion to --hidden-size."""
    output_init: OutputInit | None = None
    """Initial last matrix of every attention and FFN: zero, scaled with the depth by (2 L)^-1/2, or as the backbone's
    config says; by default zero for a preset and config for any other backbone."""
    seed: int = 0
    """Seed of initialisation and data order."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    width: WidthOptions = field(default_factory=WidthOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    reliability: ReliabilityOptions = field(default_factory=ReliabilityOptions)
    log_every: int | None = None
    """Steps between training-loss logs; by default 1 % of all."""
    eval_every: int | None = None
    """Steps between validations; by default 5 % of all."""
    save_every: int | None = None
    """Steps between checkpoints; by default 10 % of all."""
    sample_tokens: int = 64
    """Tokens of the text that the model writes at each validation (samples.jsonl, and TensorBoard), at most one for
    every 1024 validation tokens; 0 for none."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers that the logs go to, out of transformers' integrations (`tensorboard`, `wandb`, `trackio`, `mlflow`,
    ...), or `none`."""
    health_every: int | None = None
    """Steps between measurements of gradients, state and routing (health.jsonl, and the logs); by default those
    between validations, 0 for none."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """Under torchrun or accelerate launch: a copy of the model in each process (`ddp`), or the model sharded over all
    (`fsdp2`). `auto`: what accelerate's configuration asks for, else `ddp`."""
    resume: bool | Literal["auto"] = False
    """Continue the run in --out from its last whole checkpoint; `--resume auto` starts it where there is none yet."""

    def check(self) -> None:
        """Refuse what no run can do, before anything is read or written."""
        self.width.check()
        self.optim.check()
        self.corpus.check()
        self.speed.check()
        self.reliability.check()
        if (self.m is None) != (self.n is None):
            raise UserError(f"give both --m and --n, or neither; got m = {self.m}, n = {self.n}")
        if self.init_from is not None:
            self._check_start()
        if self.m is None and self.width.shape != WidthOptions():
            options = " ".join(
                f"--{f.name.replace('_', '-')}" for f in fields(WidthOptions) if f.name not in PLAIN_OPTIONS
            )
            raise UserError(f"{options} shape a virtual width; give --m and --n with them")
        if self.m is not None and self.width.table_factor > 1:
            raise UserError("--table-factor widens the table of a plain model; --m and --n do it for a virtual width")
        _at_least(self, 1, "hidden_size", "intermediate_size", "log_every", "eval_every", "save_every")
        _at_least(self, 0, "health_every", "sample_tokens")
        if self.init_from is None and self.m is None and self.speed != self.speed.for_plain_model:
            raise UserError("--connection-backend and --keep-states-every need a virtual width; give --m and --n too")
        is_free = self.width.connection == "ghc" and self.width.carry_constraint != "doubly_stochastic"
        if self.speed.keep_states_every > 1 and not is_free:
            raise UserError("--keep-states-every needs ghc without a doubly-stochastic carry; leave it at 1")
        backend, connection = self.speed.connection_backend, self.width.connection
        if not is_free and (backend == "triton" or (backend == "compiled" and connection == "hc")):
            kind = connection if connection != "ghc" else "ghc with a constrained carry"
            raise UserError(f"--connection-backend {backend} does not run connection {kind}; use auto or reference")
        loss = self.speed.loss_backend
        if self.m is None and not self.init_from and self.width == WidthOptions() and loss not in ("auto", "torch"):
            raise UserError(f"--loss-backend {loss} needs a virtual width or --mtp; a plain model keeps its own loss")
        require(
            self.corpus.window >= self.width.mtp + 2,
            "window",
            f"at least mtp + 2 = {self.width.mtp + 2}",
            self.corpus.window,
        )
        require(0 <= self.seed < 2**32, "seed", "from 0 to 2³² - 1", self.seed)
        self._check_branches()

    def _check_branches(self) -> None:
        if not self.optim.budgets and self.warmup > (flat := self.optim.steps - self.cooldown_steps):
            raise UserError(f"--warmup-steps {self.warmup} reaches into the cool-down after {flat} steps; lower it")
        seen: dict[int, Branch] = {}
        for branch in self.branches:
            if branch.steps in seen:
                other, tokens = seen[branch.steps].name, self.tokens_per_step
                raise UserError(f"--budgets {other} and {branch.name} are the same in whole steps of {tokens} tokens")
            seen[branch.steps] = branch
            if branch.leaves < self.warmup:
                raise UserError(
                    f"--budgets {branch.name} is {branch.steps} steps and leaves the trunk after {branch.leaves}, "
                    f"within the {self.warmup} steps of warm-up; give more tokens or lower --warmup-steps"
                )

    def _check_start(self) -> None:
        given = {
            "--backbone": self.backbone != TrainConfig.backbone,
            "--m and --n": self.m is not None,
            "--hidden-size": self.hidden_size is not None,
            "--intermediate-size": self.intermediate_size is not None,
            "--output-init": self.output_init is not None,
            "the options of a width": self.width != WidthOptions(),
        }
        if options := [name for name, is_given in given.items() if is_given]:
            raise UserError(
                f"--init-from {self.init_from} decides the model; drop {', '.join(options)}, or widen the "
                "checkpoint first (vwn widen)"
            )
        if self.optim.learning_rate is None:
            raise UserError("--init-from needs a --learning-rate: the presets' are for weights that start afresh")

    @property
    def name(self) -> str:
        """`plain` or `MxN`."""
        return "plain" if self.m is None else f"{self.m}x{self.n}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, over all processes."""
        return self.optim.batch_size * self.corpus.window

    @property
    def branches(self) -> tuple[Branch, ...]:
        """One for each of the ``--budgets``, the smallest first."""
        return branches_of(self.optim.budgets, self.tokens_per_step, self.optim.cooldown)

    @property
    def cooldown_steps(self) -> int:
        """Steps of the cool-down at the end of a straight run; 0 without one, and for the trunk of several budgets."""
        o = self.optim
        return decay_steps(o.steps, o.cooldown) if o.schedule == "wsd" and not o.budgets else 0

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps
        return max(1, (self.branches[0].steps if self.branches else self.optim.steps) // 20)

    @property
    def planned_steps(self) -> int:
        """Optimiser steps of the whole run, of the trunk and all its branches."""
        branches = self.branches
        return branches[-1].leaves + sum(b.steps - b.leaves for b in branches) if branches else self.optim.steps

    @property
    def intervals(self) -> tuple[int, int, int]:
        """Steps between logs, validations and checkpoints; the defaults are multiples of each other."""
        log = self.log_every or max(1, (self.branches[-1].steps if self.branches else self.optim.steps) // 100)
        return log, self.eval_every or 5 * log, self.save_every or 10 * log


def _at_least(options: Any, least: int, *names: str) -> None:
    """Refuse numbers that are smaller or not finite; None stands for a default."""
    for name in names:
        value = getattr(options, name)
        what = f"{'finite and ' if isinstance(value, float) else ''}at least {least}"
        require(value is None or least <= value < inf, name, what, value)
