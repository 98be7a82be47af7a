"""The command line: `vwn train | compare | generate | inspect | eval | widen | cost`. The only file that knows tyro.

Imports of torch are in the functions that run a command, so that help and typing errors are answered at once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from vwn.commands.evaluation.config import EvalConfig
from vwn.commands.inspection.config import InspectConfig
from vwn.common.errors import UserError, require
from vwn.common.extras import require_packages
from vwn.common.files import NO_ROOM, CannotWrite
from vwn.common.version import __version__
from vwn.cost.cluster.options import CostConfig, PlanOptions
from vwn.help import Command, command_help, overview, unknown_command, unknown_option
from vwn.lab.compare.arms import check_arms, parse_arm
from vwn.lab.compare.config import CompareConfig
from vwn.training.config import TrainConfig, WidthOptions
from vwn.training.options_file import read_options

try:
    require_packages("the command line", "tyro")
except UserError as missing:
    print(f"vwn: {missing}", file=sys.stderr)
    sys.exit(2)
import tyro

PYTHON_NAMES = {"num-mtp-modules": "mtp", "dynamic": "no-static", "no-dynamic": "static"}
"""Options that `VirtualWidthConfig` calls otherwise; either name is taken."""


Checkpoint = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained model."""

    checkpoint: Checkpoint
    """A run directory, one of its checkpoints, or a hub id."""
    prompt: str | None = None
    """Text to continue; without it, each line that you type or pipe in is continued."""
    max_new_tokens: int = 100
    """Tokens to add."""
    temperature: float | None = None
    """Sampling temperature, by default 0.8; 0 takes the likeliest token each time, and so does --mtp."""
    top_p: float = 0.95
    """Nucleus sampling: the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the sampling."""
    mtp: bool = False
    """Draft tokens with the model's MTP modules, and say how many were accepted and how fast it was."""
    tokenizer: str | None = None
    """Tokenizer, where the checkpoint's folder has none: bytes, a folder, or a hub id."""
    json: bool = False
    """Print JSON: the text and, with --mtp, the numbers."""


@dataclass(frozen=True)
class InspectCommand(InspectConfig):
    """Show what the connections of a trained model do, as figures and numbers."""

    checkpoint: Checkpoint
    """A run directory, one of its checkpoints, or a hub id."""


@dataclass(frozen=True)
class EvalCommand(EvalConfig):
    """Measure a trained model: losses on a text, scores on tasks, or both."""

    checkpoint: Checkpoint
    """A run directory, one of its checkpoints, a folder with any causal language model, or a hub id."""


@dataclass(frozen=True)
class WidenConfig:
    """Give a trained model virtual width; its logits stay the same."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder with any causal language model of transformers, or a hub id owner/name."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the widened model; must not hold one."""
    m: int = 1
    """Fraction rate: the hidden size is cut into m segments."""
    n: int = 4
    """Slots of the over-width state, n >= m; the virtual width factor is n / m."""
    embedding: Literal["replicated", "direct"] = "replicated"
    """replicated repeats the embedding over the slots; direct makes a table as wide as the state, with equal logits."""
    reduce_norm: Literal["none", "rms_norm"] = "none"
    """Norm of group size D before the reduce; with none, the logits stay the same to the bit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto keeps the checkpoint's."""


def run_train(config: TrainConfig) -> None:
    """`vwn train`."""
    from vwn.common.memory import keep_freed_memory
    from vwn.training.distributed import leave
    from vwn.training.run import train

    keep_freed_memory()
    result = train(config)
    leave()
    if not is_first_process():
        return
    last = result.curve[-1]
    further = "" if last["loss_2"] is None else f", next-2-token {last['loss_2']:.4f}"
    print(f"{config.out}: validation loss {last['loss']:.4f} nats per token{further} after {last['tokens']:,} tokens")
    print(f'next: vwn generate {shlex.quote(str(config.out))} --prompt "..."')


def run_compare(config: CompareConfig) -> None:
    """`vwn compare`."""
    from vwn.common.memory import keep_freed_memory
    from vwn.lab.compare.run import adopt, compare

    keep_freed_memory()
    compare(adopt(config, given_options()))


def run_generate(config: GenerateConfig) -> None:
    """`vwn generate`."""
    from vwn.commands.generate import continuation, continue_with_mtp, drafting_line, load

    if config.mtp:
        if config.temperature:
            raise UserError(f"--mtp decodes greedily, at temperature 0, got --temperature {config.temperature}")
        if sampling := sorted({"top_p", "seed"} & given_options()):
            raise UserError(f"--mtp decodes greedily, without --{sampling[0].replace('_', '-')}; drop it")
    temperature = 0.8 if config.temperature is None else config.temperature
    if config.prompt is None and sys.stdin.isatty():
        print("vwn: type a prompt and press Enter; Ctrl-D ends", file=sys.stderr)
    typed = (line.rstrip("\n") for line in sys.stdin if line.strip())
    loaded = None
    for prompt in typed if config.prompt is None else [config.prompt]:
        loaded = loaded or load(config.checkpoint, config.tokenizer)
        if config.mtp:
            result = continue_with_mtp(*loaded, prompt, config.max_new_tokens)
        else:
            text = continuation(*loaded, prompt, config.max_new_tokens, temperature, config.top_p, config.seed)
            result = {"text": text}
        print(json.dumps(result) if config.json else result["text"], flush=True)
        if config.mtp and not config.json:
            print(f"vwn: {drafting_line(result)}", file=sys.stderr)


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
    from vwn.training.directory import locate

    wide = widen_checkpoint(**vars(config) | {"model": str(locate(config.model))})
    c, count = wide.config, sum(p.numel() for p in wide.parameters())
    width = f"m = {c.m}, n = {c.n}"
    print(f"{config.out}: {c.backbone.model_type}, {width}, {count:,} parameters, same logits as {config.model}")


def run_cost(config: CostConfig) -> None:
    """`vwn cost`."""
    from vwn.cost import cost_table
    from vwn.cost.cluster.options import parse_cluster
    from vwn.cost.cluster.plan import plan_rows, plan_text, plans
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
    models, _ = arm_models(check_arms(map(parse_arm, config.arms)), backbone, WidthOptions(mtp=config.mtp), window)
    if cluster is None:
        rows, table = cost_table(models, window)
    else:
        found = plans(models, cluster, config.plan, window)
        rows, table = plan_rows(found), plan_text(found)
    print(json.dumps(rows, indent=1) if config.json else table)


COMMANDS = {
    "train": Command(
        TrainConfig,
        run_train,
        (
            "train --out runs/wide --m 4 --n 8 --data mytext/ --steps 1000",
            "train --out runs/wide --resume",
            "train runs/wide --out runs/again --seed 1",
            "train --out runs/small --backbone small --m 4 --n 16 --tokenizer bpe:8192 --window 512",
        ),
        ("out", "data", "backbone", "m", "n"),
        packages=("accelerate",),
        file="a run's directory or run.json, to repeat it, or options in .yaml or .json; those typed beside it win.",
    ),
    "compare": Command(
        CompareConfig,
        run_compare,
        (
            "compare --out runs/widths --arms plain 4x16 --seeds 0 1 2",
            "compare --out runs/study --study widths --lr-sweep off",
        ),
        ("out", "arms", "data", "backbone", "seeds"),
        packages=("accelerate", "tensorboard", "matplotlib", "jinja2"),
        hidden=("stream", "skip-bad-rows"),
    ),
    "generate": Command(
        GenerateConfig,
        run_generate,
        ('generate runs/wide --prompt "def main"', "generate runs/wide"),
        ("checkpoint", "prompt", "max-new-tokens", "temperature"),
    ),
    "inspect": Command(
        InspectCommand,
        run_inspect,
        ("inspect runs/wide --out runs/wide-inside",),
        ("checkpoint", "out", "data"),
        packages=("matplotlib",),
    ),
    "eval": Command(
        EvalCommand,
        run_eval,
        ("eval runs/wide --data other.txt", "eval runs/wide --tasks piqa lambada --data-dir tasks/"),
        ("checkpoint", "data", "tasks", "data-dir", "out"),
    ),
    "widen": Command(WidenConfig, run_widen, ("widen path/to/model wide --m 1 --n 4",), ("model", "out", "m", "n")),
    "cost": Command(
        CostConfig,
        run_cost,
        (
            "cost --backbone small --arms plain 2x3 4x16",
            "cost --backbone path/to/config.json --cluster h100:8x16 --arms plain 4x8",
        ),
        ("backbone", "arms", "window", "cluster", "json"),
    ),
}


def given_options() -> set[str]:
    """Field names of the options on the command line, which a resumed run must not take from its record."""
    return {_option(word).removeprefix("no-").replace("-", "_") for word in arguments(sys.argv[1], sys.argv[2:])}


def _option(word: str) -> str:
    """Return the name of an option as it is typed; empty for any other word."""
    return word.split("=")[0].removeprefix("--").replace("_", "-") if word.startswith("--") else ""


def arguments(name: str, given: list[str]) -> list[str]:
    """Check the names of a command's options, take those of a file in, and translate what tyro does not know."""
    command, found = COMMANDS[name], []
    known = {option.name for option in command.options if not option.positional}
    known |= {f"no-{option.name}" for option in command.options if option.switch}
    if command.file and given and not given[0].startswith("-"):
        from_file, given = read_options(Path(given[0])), given[1:]
        typed = {PYTHON_NAMES.get(_option(word), _option(word)).removeprefix("no-") for word in given}
        given = [word for option, words in from_file.items() if option not in typed for word in words] + given
    for argument, following in zip(given, [*given[1:], ""], strict=False):
        option = _option(argument)
        if option not in known and PYTHON_NAMES.get(option) in known:
            argument = argument.replace(argument.split("=")[0], f"--{PYTHON_NAMES[option]}", 1)
        elif option and option not in known:
            raise UserError(unknown_option(name, command, option))
        is_bare = argument == "--resume" and name == "train" and following not in ("auto", "True", "False")
        found.append("--resume=True" if is_bare else argument)
    return found


def parse(name: str, given: list[str]) -> Any:
    """Make the configuration of a command from its options; tyro exits with 2 where they are wrong.

    A training run that goes on takes the options that are not given from its record.
    """
    given = arguments(name, given)
    make = partial(tyro.cli, COMMANDS[name].config, prog=f"vwn {name}", config=(tyro.conf.OmitArgPrefixes,))
    config = make(args=given)
    if name == "train" and config.resume and (record := config.out / "run.json").exists():
        return make(args=arguments(name, [str(record), *given]))
    return config


def help_text(given: list[str]) -> str | None:
    """Return the text to print if the command line asks for help or the version, else None."""
    words = [word for word in given if word not in ("-h", "--help", "help")]
    if not words:
        return overview(COMMANDS)
    if given[0] in ("--version", "-V", "version"):
        return f"vwn {__version__}"
    if len(words) < len(given) and words[0] in COMMANDS and ("-h" in given or "--help" in given or given[0] == "help"):
        return command_help(words[0], COMMANDS[words[0]])
    return None


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of several: the one that prints."""
    return int(os.environ.get("RANK") or 0) == 0


def show_our_logs() -> None:
    """Print the package's log, such as the backends chosen, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("vwn: %(message)s"))
    logger = logging.getLogger("vwn")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)


def fail(sentence: str, code: int) -> NoReturn:
    """Print the sentence once, whatever the number of processes, and exit."""
    if is_first_process() or code == os.EX_UNAVAILABLE:  # the first process may be the one that is lost
        print(sentence, file=sys.stderr)
    else:
        time.sleep(2)  # the launcher ends all processes when one exits; let the first print before
    sys.exit(code)


def main() -> None:
    """Entry point; exits with 2 and one line for what the user can repair (`VWN_DEBUG=1` shows the traceback)."""
    try:
        given = sys.argv[1:]
        if (text := help_text(given)) is not None:
            print(text)
            return
        name = given[0]
        if name not in COMMANDS:
            raise UserError(unknown_command(name, COMMANDS))
        config = parse(name, given[1:])
        require_packages(f"vwn {name}", *COMMANDS[name].packages)
        show_our_logs()
        processes = int(os.environ.get("WORLD_SIZE") or 1)
        if processes > 1 and name != "train":
            raise UserError(f"only vwn train works in several processes, {processes} were launched; use no launcher")
        COMMANDS[name].run(config)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("vwn: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("VWN_DEBUG"):
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            text += "; the disk is full: make room and continue with --resume; nothing saved is lost"
            fail(f"vwn: {text}", CannotWrite.exit_code)
        if isinstance(error, (ValueError, OSError)):
            fail(f"vwn: {text}", getattr(error, "exit_code", 2))
        fail(f"vwn: {type(error).__name__}: {text[:300]} (unexpected; VWN_DEBUG=1 shows where)", 1)


if __name__ == "__main__":
    main()
