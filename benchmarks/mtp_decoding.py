"""Self-speculative decoding with the MTP modules: how many drafts are accepted, and how much faster it is.

The models are trained checkpoints, such as those of ``vwn train --mtp 1``. The prompts are pieces of a text that they
have not seen. For each, plain greedy decoding and decoding with the modules take turns, and must give the same tokens.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.report import NOT_MEASURED, Report, parser
from vwn.commands.generate import load, timed
from vwn.common.errors import UserError

NOTES = {
    "acceptance": "accepted over drafted tokens, of all modules, and of each",
    "tokens per pass": "new tokens per forward pass of the main model, the prompt's included; plain decoding has 1",
    "speed-up": "seconds of plain greedy decoding of all prompts over those with the modules, prompts included",
    "same tokens": "share of the prompts for which both give the same tokens; below 1 only by rounding",
    "precision": "float32, batch size 1",
}
COLUMNS = {
    "who": "24s",
    "modules": "7d",
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
    """Measure, show, write."""
    p = parser("mtp_decoding", __doc__)
    p.add_argument("checkpoints", nargs="+", help="run directories or checkpoints of models with MTP modules")
    p.add_argument("--text", type=Path, required=True, help="file that prompts are cut from")
    p.add_argument("--prompts", type=int, default=20)
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=128, help="for each prompt")
    options = p.parse_args()
    if options.quick:
        options.prompts, options.prompt_tokens, options.new_tokens = 2, 8, 8
    report = Report(options, NOTES, COLUMNS)
    measure.settle(1 if options.device == "cpu" else torch.get_num_threads())
    for checkpoint in options.checkpoints:
        try:
            model, tokenizer = load(checkpoint)
            if options.backend != "auto":
                model.set_connection_backend(options.backend)
            ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
            prompts = _prompts(ids.to(model.device), options.prompts, options.prompt_tokens)
            row = {"modules": model.config.num_mtp_modules, **_decoding(model, prompts, options.new_tokens)}
        except UserError as error:
            row = {NOT_MEASURED: str(error)}
        report.add({"who": checkpoint} | row)
    report.done()


def _prompts(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """Pieces ``[1, length]``, spread evenly over the text."""
    starts = torch.linspace(0, max(0, ids.shape[1] - length), count).long().tolist()
    return [ids[:, start : start + length] for start in starts]


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
