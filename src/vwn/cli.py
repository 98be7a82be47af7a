"""The command line: `vwn train | compare | generate | cost`. The only file that knows tyro."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from vwn.compare.config import CompareConfig, parse_width
from vwn.training.config import TrainConfig, WidthOptions


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory, one of its checkpoints, or a hub id."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Nucleus sampling: the smallest set of tokens with this probability."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass(frozen=True)
class CostConfig:
    """Parameters, FLOPs, activation bytes and memory traffic of some widths, before anyone spends money."""

    backbone: str = "tiny"
    """A preset, a transformers config (file or folder), or a hub id."""
    widths: tuple[str, ...] = ("plain", "2x3", "4x16", "8x64")
    """`plain` and `MxN`."""
    window: int = 2048
    """Sequence length that the attention scores are counted for."""
    vocab_size: int = 32_768
    """Vocabulary of a preset; a config has its own."""
    mtp: int = 0
    """Multi-token prediction modules."""
    json: bool = False
    """Print JSON instead of a table."""


def run_train(config: TrainConfig) -> None:
    """`vwn train`."""
    from vwn.training.run import train

    result = train(config)
    last = result.curve[-1]
    further = "" if last["loss_2"] is None else f", next-2-token {last['loss_2']:.4f}"
    print(f"{config.out}: validation loss {last['loss']:.4f} nats per token{further} after {last['tokens']:,} tokens")


def run_compare(config: CompareConfig) -> None:
    """`vwn compare`."""
    from vwn.compare.run import compare

    compare(config)


def run_generate(config: GenerateConfig) -> None:
    """`vwn generate`."""
    from vwn.generation import generate

    print(generate(**vars(config)))


def run_cost(config: CostConfig) -> None:
    """`vwn cost`."""
    from vwn.cost import cost_table
    from vwn.training.model import load_backbone, model_config

    preset_vocabulary = config.vocab_size if "/" not in config.backbone else 0
    backbone = load_backbone(config.backbone, preset_vocabulary, config.window)
    models = {w: model_config(backbone, *parse_width(w), WidthOptions(mtp=config.mtp)) for w in config.widths}
    rows, table = cost_table(models, config.window)
    print(json.dumps(rows, indent=1) if config.json else table)


RUN: dict[type, Any] = {
    TrainConfig: run_train,
    CompareConfig: run_compare,
    GenerateConfig: run_generate,
    CostConfig: run_cost,
}

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train", description="Train one model on real text.")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare", description="Train arms side by side and report.")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate", description="Continue a prompt.")]
    | Annotated[CostConfig, tyro.conf.subcommand("cost", description="What a width costs, by the paper's formulas.")]
)


def main() -> None:
    """Entry point; exits with 2 and one line for what the user can repair (`VWN_DEBUG=1` shows the traceback)."""
    try:
        config = tyro.cli(
            Command,
            prog="vwn",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        RUN[type(config)](config)
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("VWN_DEBUG"):
            raise
        print(f"vwn: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("vwn: interrupted; continue with --resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
