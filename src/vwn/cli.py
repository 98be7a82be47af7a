"""The command line: `vwn train | compare | generate | inspect | eval | widen | cost`. The only file that knows tyro."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from vwn.commands.evaluation.config import EvalConfig
from vwn.commands.inspection.config import InspectConfig
from vwn.common.errors import UserError
from vwn.common.files import NO_ROOM, CannotWrite
from vwn.common.processes import LostProcess, first_process, launched_processes
from vwn.cost.cluster.options import PlanOptions
from vwn.lab.compare.arms import check_arms, parse_arm
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import TrainConfig, WidthOptions, require


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory, one of its checkpoints, or a hub id."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to add."""
    temperature: float | None = None
    """Sampling temperature, by default 0.8; 0 takes the likeliest token each time, as --mtp does."""
    top_p: float = 0.95
    """Nucleus sampling: the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the sampling."""
    mtp: bool = False
    """Draft tokens with the model's MTP modules, and say how many were accepted and how fast it was."""
    json: bool = False
    """Print JSON: the text and, with --mtp, the numbers."""


@dataclass(frozen=True)
class InspectCommand(InspectConfig):
    """Look inside a trained model."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory, one of its checkpoints, or a hub id."""


@dataclass(frozen=True)
class EvalCommand(EvalConfig):
    """Measure a trained model: losses on a text, scores on tasks, or both."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory, one of its checkpoints, a folder with any causal language model, or a hub id."""


@dataclass(frozen=True)
class WidenConfig:
    """Give a trained model virtual width, keeping its weights and its function."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder with any causal language model of transformers, or a hub id."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the widened model; must not hold one."""
    m: int = 4
    """Fraction rate: the hidden size is cut into m segments."""
    n: int = 8
    """Slots of the over-width state, n >= m; the virtual width factor is n / m."""
    embedding: Literal["replicated", "direct"] = "replicated"
    """Repeat the table's rows over the slots, or make a table as wide as the state that starts so."""
    reduce_norm: Literal["none", "rms_norm"] = "none"
    """Norm of group size D in front of the reduce; with "none" the function is kept to the bit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; "auto" keeps the checkpoint's."""


@dataclass(frozen=True)
class CostConfig:
    """Parameters, FLOPs, activation bytes and memory traffic of some arms, before anyone spends money."""

    backbone: str = "tiny"
    """A preset, a transformers config (file or folder), or a hub id."""
    arms: tuple[str, ...] = ("plain", "2x3", "4x16", "8x64")
    """`plain`, `MxN`, and any other arm of `vwn compare`."""
    window: int = 2048
    """Sequence length that the attention scores are counted for."""
    vocab_size: int = 32_768
    """Vocabulary of a preset; a config has its own."""
    mtp: int = 0
    """Multi-token prediction modules."""
    plan: PlanOptions = field(default_factory=PlanOptions)
    json: bool = False
    """Print JSON instead of a table."""


def run_train(config: TrainConfig) -> None:
    """`vwn train`."""
    from vwn.common.provenance import keep_freed_memory
    from vwn.training.directory import adopt
    from vwn.training.distributed import leave
    from vwn.training.run import train

    keep_freed_memory()
    config = adopt(config, given_options())
    result = train(config)
    leave()
    if not first_process():
        return
    last = result.curve[-1]
    further = "" if last["loss_2"] is None else f", next-2-token {last['loss_2']:.4f}"
    print(f"{config.out}: validation loss {last['loss']:.4f} nats per token{further} after {last['tokens']:,} tokens")


def run_compare(config: CompareConfig) -> None:
    """`vwn compare`."""
    from vwn.common.provenance import keep_freed_memory
    from vwn.lab.compare.run import adopt, compare

    keep_freed_memory()
    compare(adopt(config, given_options()))


def run_generate(config: GenerateConfig) -> None:
    """`vwn generate`."""
    from vwn.commands.generate import generate, generate_with_mtp

    if config.mtp:
        if config.temperature:
            raise UserError(f"--mtp decodes greedily, at temperature 0, got --temperature {config.temperature}")
        if sampling := sorted({"top_p", "seed"} & given_options()):
            raise UserError(f"--mtp decodes greedily, without --{sampling[0].replace('_', '-')}; leave it away")
        drafted = generate_with_mtp(config.checkpoint, config.prompt, config.max_new_tokens)
        print(json.dumps(asdict(drafted)) if config.json else drafted.text)
        if not config.json:
            print(f"vwn: {drafted.summary()}", file=sys.stderr)
        return
    temperature = 0.8 if config.temperature is None else config.temperature
    text = generate(config.checkpoint, config.prompt, config.max_new_tokens, temperature, config.top_p, config.seed)
    print(json.dumps({"text": text}) if config.json else text)


def run_inspect(config: InspectCommand) -> None:
    """`vwn inspect`."""
    from vwn.commands.inspection.run import inspect_checkpoint

    result = inspect_checkpoint(config)
    radii = [s["spectral_radius"]["mean"] for s in result["sublayers"]]
    print(
        f"{config.out / 'inspect.html'}: {len(radii)} sublayers on {result['tokens']:,} tokens, spectral radius of the "
        f"carry {min(radii):.3f} to {max(radii):.3f}"
    )


def run_eval(config: EvalCommand) -> None:
    """`vwn eval`."""
    from vwn.commands.evaluation.run import evaluate_checkpoint, tasks_table, text_line

    result = evaluate_checkpoint(config)
    if "text" in result:
        print(text_line(result))
    if "tasks" in result:
        print(tasks_table(result))


def run_widen(config: WidenConfig) -> None:
    """`vwn widen`."""
    from vwn.hf.conversion import widen_checkpoint

    wide = widen_checkpoint(**vars(config))
    c, count = wide.config, sum(p.numel() for p in wide.parameters())
    width = f"m = {c.m}, n = {c.n}"
    print(f"{config.out}: {c.backbone.model_type}, {width}, {count:,} parameters, same logits as {config.model}")


def run_cost(config: CostConfig) -> None:
    """`vwn cost`."""
    from vwn.cost.cluster.hardware import parse_cluster
    from vwn.cost.cluster.plan import plans
    from vwn.cost.cluster.table import plan_rows, plan_text
    from vwn.cost.model import cost_table
    from vwn.lab.compare.models import arm_models
    from vwn.training.model import load_backbone
    from vwn.training.presets import PRESETS

    planned = {f.name for f in fields(PlanOptions)} & given_options()
    if planned and config.plan.cluster is None:
        raise UserError(f"--{min(planned).replace('_', '-')} plans a training run; name the machines with --cluster")
    config.plan.check()
    cluster = None if config.plan.cluster is None else parse_cluster(config.plan.cluster)
    for name in ("window", "vocab_size"):
        require(getattr(config, name) >= 1, name, "at least 1", getattr(config, name))
    # A preset takes the sizes asked for; a config has its own, and no tokenizer's to meet.
    asked = (config.vocab_size, config.window) if config.backbone in PRESETS else (0, 1)
    backbone = load_backbone(config.backbone, *asked)
    window = min(config.window, getattr(backbone, "max_position_embeddings", config.window))
    arms = check_arms(map(parse_arm, config.arms))
    models, _ = arm_models(arms, backbone, WidthOptions(mtp=config.mtp), window)
    if cluster is None:
        rows, table = cost_table(models, window)
    else:
        found = plans(models, cluster, config.plan, window)
        rows, table = plan_rows(found), plan_text(found)
    print(json.dumps(rows, indent=1) if config.json else table)


RUN: dict[type, Any] = {
    TrainConfig: run_train,
    CompareConfig: run_compare,
    GenerateConfig: run_generate,
    InspectCommand: run_inspect,
    EvalCommand: run_eval,
    WidenConfig: run_widen,
    CostConfig: run_cost,
}

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train", description="Train one model on real text.")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare", description="Train arms side by side and report.")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate", description="Continue a prompt.")]
    | Annotated[InspectCommand, tyro.conf.subcommand("inspect", description="Look inside a trained model.")]
    | Annotated[EvalCommand, tyro.conf.subcommand("eval", description="Measure a trained model.")]
    | Annotated[WidenConfig, tyro.conf.subcommand("widen", description="Give a trained model virtual width.")]
    | Annotated[CostConfig, tyro.conf.subcommand("cost", description="What a width costs, on one device or a cluster.")]
)


def given_options() -> set[str]:
    """Names of the options on the command line, as fields: what a resumed run must not take from its record."""
    flags = (argument.split("=")[0] for argument in sys.argv[1:] if argument.startswith("--"))
    return {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}


def arguments() -> list[str]:
    """The command line, with what tyro cannot say: of `train`, a `--resume` alone and one with a word after it."""
    given, found = sys.argv[1:], []
    for argument, following in zip(given, [*given[1:], ""], strict=True):
        found.append("--resume=False" if argument == "--no-resume" and given[0] == "train" else argument)
        if argument == "--resume" and given[0] == "train" and following not in ("auto", "True", "False"):
            found[-1] = "--resume=True"
    return found


def show_our_logs() -> None:
    """What a run took and why (backends) goes to stderr, where its progress goes too."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vwn: %(message)s"))
    logger = logging.getLogger("vwn")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if first_process() else logging.ERROR)


def fail(sentence: str, code: int) -> NoReturn:
    """Say it once, whatever the number of processes, and exit."""
    if first_process() or code == LostProcess.exit_code:  # the first may be the one that is gone
        print(sentence, file=sys.stderr)
    else:
        time.sleep(2)  # the launcher ends all when one has ended, and the first is to have spoken
    sys.exit(code)


def main() -> None:
    """Entry point; exits with 2 and one line for what the user can repair (`VWN_DEBUG=1` shows the traceback)."""
    try:
        config = tyro.cli(
            Command,
            args=arguments(),
            prog="vwn",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        show_our_logs()
        if launched_processes() > 1 and not isinstance(config, TrainConfig):
            raise UserError(
                f"{launched_processes()} processes were launched, and only vwn train works in several; start this "
                "command without a launcher"
            )
        RUN[type(config)](config)
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("VWN_DEBUG"):
            raise
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        advice = "; the disk takes no more: make room and go on with --resume, nothing saved is lost" if full else ""
        code = CannotWrite.exit_code if full else getattr(error, "exit_code", 2)
        fail(f"vwn: {' '.join(str(error).split())}{advice}", code)
    except KeyboardInterrupt:
        print("vwn: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("VWN_DEBUG"):
            raise
        text = " ".join(str(error).split())[:300]
        fail(f"vwn: {type(error).__name__}: {text} (unexpected; VWN_DEBUG=1 shows where)", 1)


if __name__ == "__main__":
    main()
