"""Self-speculative decoding with the MTP modules: how many drafts are accepted, and how much faster it is.

Each model is trained here for a short time, plain and with a virtual width. The prompts are from the text's held-out
side. For each, plain greedy decoding and decoding with the modules take turns, and must give the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import measure
from benchmarks.report import FOLDER, NOT_MEASURED, Report, parser
from vwn.commands.generate import timed
from vwn.common.errors import UserError
from vwn.data import Corpus
from vwn.training.config import CorpusConfig, OptimConfig, TrainConfig, WidthOptions
from vwn.training.run import load_corpus, train

SHAPES = [(4, 16)]
WINDOW = 256
NOTES = {
    "acceptance": "accepted over drafted tokens, of all modules, and of each",
    "tokens per pass": "new tokens per forward pass of the main model, the prompt's included; plain decoding has 1",
    "speed-up": "seconds of plain greedy decoding of all prompts over those with the modules, prompts included",
    "same tokens": "share of the prompts for which both give the same tokens; below 1 only by rounding",
    "precision": "float32, batch size 1",
}
COLUMNS = {
    "who": "8s",
    "modules": "7d",
    "loss": "7.3f",
    "loss_2": "7.3f",
    "acceptance": "10.3f",
    "tokens_per_pass": "15.3f",
    "greedy_ms_per_token": "19.2f",
    "ms_per_token": "12.2f",
    "speed_up": "8.3f",
    "lowest_speed_up": "15.3f",
    "highest_speed_up": "16.3f",
    "same_tokens": "11.2f",
}


def main() -> None:
    """Train, measure, show, write."""
    p = parser("mtp_decoding", __doc__)
    p.add_argument("--data", help="as of `vwn train`; by default the Python standard library's sources")
    p.add_argument("--tokenizer", help="as of `vwn train`; by default bpe:2048")
    p.add_argument("--backbone", help="as of `vwn train`; by default tiny, and medium on a GPU")
    p.add_argument("--steps", type=int, help="of training, of 8 windows of 256 tokens; by default 600")
    p.add_argument("--modules", type=lambda text: [int(k) for k in text.split(",")], help="chain lengths; default 1,2")
    p.add_argument("--prompts", type=int, help="by default 20")
    p.add_argument("--new-tokens", type=int, help="for each prompt; by default 128")
    options = _with_defaults(p.parse_args())
    report = Report(options, NOTES, COLUMNS)
    measure.settle(1 if options.device == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        corpus = CorpusConfig(
            data=options.data or _small_text(Path(folder)),
            tokenizer=options.tokenizer,
            window=32 if options.quick else WINDOW,
            max_valid_tokens=256 if options.quick else 65_536,
        )
        for shape in (None, *(options.shapes or SHAPES)):
            for modules in options.modules:
                config = TrainConfig(
                    out=Path(folder) / f"{shape}-{modules}",
                    backbone=options.backbone,
                    m=shape[0] if shape else None,
                    n=shape[1] if shape else None,
                    corpus=corpus,
                    width=WidthOptions(mtp=modules),
                    optim=OptimConfig(steps=options.steps, batch_size=8),
                    eval_every=options.steps,
                    save_every=options.steps,
                )
                report.add({"who": config.name, "modules": modules} | _row(config, options))
    report.done()


def _with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    quick, gpu = options.quick, options.device == "cuda"
    defaults: dict[str, Any] = {
        "data": None if quick else "stdlib",
        "tokenizer": "bytes" if quick else "bpe:2048",
        "backbone": "nano" if quick else "medium" if gpu else "tiny",
        "steps": 3 if quick else 600,
        "modules": [1, 2],
        "prompts": 2 if quick else 20,
        "new_tokens": 8 if quick else 128,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _small_text(folder: Path) -> str:
    """The benchmarks' own sources, to see that it runs."""
    path = folder / "text.txt"
    path.write_text("".join(source.read_text() for source in sorted(FOLDER.glob("*.py"))))
    return str(path)


def _row(config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    try:
        corpus = load_corpus(config)
        last = train(config, corpus).curve[-1]
        model = AutoModelForCausalLM.from_pretrained(config.out).eval().to(options.device)
        if config.m is not None:
            model.set_connection_backend(options.backend)
    except UserError as error:
        return {NOT_MEASURED: str(error)}
    losses = {"loss": last["loss"], "loss_2": last["loss_2"], "train_seconds": last["seconds"]}
    return losses | _decoding(model, _prompts(corpus, options), options.new_tokens)


def _prompts(corpus: Corpus, options: argparse.Namespace) -> list[Tensor]:
    """The beginnings of held-out windows, spread evenly over the text, ``[1, window / 4]``."""
    windows, count = corpus.valid, min(options.prompts, len(corpus.valid))
    ids = [torch.as_tensor(windows[i * len(windows) // count]["input_ids"]) for i in range(count)]
    return [window[None, : len(window) // 4].long().to(options.device) for window in ids]


def _decoding(model: Any, prompts: list[Tensor], new_tokens: int) -> dict[str, Any]:
    common = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use_mtp in (False, True):  # what is set up at the first call is on nobody's account
        timed(model, prompts[0], use_mtp=use_mtp, **common)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    drafted = accepted = torch.zeros(model.config.num_mtp_modules)
    passes = same = 0
    for number, prompt in enumerate(prompts):
        tokens = {}
        for use_mtp in (False, True) if number % 2 == 0 else (True, False):
            tokens[use_mtp], took = timed(model, prompt, use_mtp=use_mtp, **common)
            seconds[use_mtp].append(took)
        counts = model.draft_counts
        drafted, accepted = drafted + torch.tensor(counts.drafted), accepted + torch.tensor(counts.accepted)
        passes += counts.forward_passes
        same += torch.equal(tokens[False], tokens[True])
    total, each = new_tokens * len(prompts), [g / s for g, s in zip(seconds[False], seconds[True], strict=True)]
    return {
        "prompts": len(prompts),
        "prompt_tokens": prompts[0].shape[1],
        "new_tokens": new_tokens,
        "acceptance": float(accepted.sum() / drafted.sum()),
        "acceptance_of_each_module": (accepted / drafted).tolist(),
        "tokens_per_pass": total / passes,
        "greedy_ms_per_token": sum(seconds[False]) / total * 1e3,
        "ms_per_token": sum(seconds[True]) / total * 1e3,
        "speed_up": sum(seconds[False]) / sum(seconds[True]),
        "median_speed_up": statistics.median(each),
        "lowest_speed_up": min(each),
        "highest_speed_up": max(each),
        "same_tokens": same / len(prompts),
    }


if __name__ == "__main__":
    main()
