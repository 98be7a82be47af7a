"""Losses of a model on a text, per token and per byte.

Legend: B windows of a batch, W tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from vwn.common.errors import UserError
from vwn.data.corpus import prepare_run, prepare_valid
from vwn.data.packing import spread
from vwn.data.tokenizer import load_checkpoint_tokenizer
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.loading import check_positions, positions_of

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class EvaluationText:
    """A tokenised text; ``bytes`` is its length in UTF-8, to which the ends of documents add nothing."""

    name: str
    tokens: np.ndarray
    bytes: int
    tokenizer: Any
    max_tokens: int | None


def load_text(source: Path | str, data: str | None, record: dict[str, Any], tokenizer: Any = None) -> EvaluationText:
    """Tokenise the text named ``data`` (see :func:`vwn.data.prepare`), or by default the validation text of the run.

    ``record`` is the run's ``run.json``, empty if there is none; ``tokenizer`` is by default the checkpoint's own.

    Raises:
        UserError: no text, or not the one the run was validated on any more.
    """
    run = record.get("config", {})
    if data is not None:
        tokenizer = tokenizer or load_checkpoint_tokenizer(source)
        corpus, name, limit = prepare_valid(data, tokenizer=tokenizer, window=2), data, None
    elif "corpus.data" not in run:
        raise UserError(f"{source} does not say what text it was trained on (it has no run.json); give --data")
    else:
        train, valid = run["corpus.data"], run["corpus.valid"]
        try:
            corpus = prepare_run(run, window=2)
        except UserError as error:
            raise UserError(f"the run's own text cannot be read ({error}); give --data") from error
        if corpus.fingerprint != record.get("text", "").partition("+")[0]:
            raise UserError(f"the text {train} is not the one that {source} was trained on any more; give --data")
        name, limit = valid or f"{train} (held-out part)", run["corpus.max_valid_tokens"]
    tokens = np.memmap(corpus.valid.path, dtype=corpus.valid.dtype, mode="r")
    return EvaluationText(name, tokens, round(corpus.valid_bytes_per_token * len(tokens)), corpus.tokenizer, limit)


def byte_lengths(tokenizer: Any) -> np.ndarray:
    """Return the length in UTF-8 bytes of each token id, ``[largest id + 1]``; 0 for the end of text.

    Exact for byte-level tokenisers, whose pieces have one character per byte. For others the piece's own text is
    counted, which can differ from the text that was tokenised (a leading space, another case).
    """
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    pieces = tokenizer.get_vocab()
    lengths = np.zeros(max(pieces.values()) + 1, dtype=np.int64)
    for piece, index in pieces.items():
        if is_byte_level:
            lengths[index] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x"):
            lengths[index] = 1
        else:
            lengths[index] = len(piece.removeprefix("##").replace("▁", " ").encode())
    for index, added in tokenizer.added_tokens_decoder.items():
        lengths[index] = len(added.content.encode())
    lengths[tokenizer.eos_token_id] = 0
    return lengths


def measure_text(
    model: Any,
    text: EvaluationText,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure the mean losses of a model, of every head if it has MTP modules, over the windows of a text.

    Each window is read without context before it. All targets of the first window are counted, of the others the last
    ``stride``; a target of the next-but-``k`` head needs ``k + 1`` tokens before it. With a stride as long as the
    window, the default, these are the windows and targets of a training run's validation. ``max_tokens`` limits the
    tokens of all windows, which are spread evenly; by default the text's own limit.

    Returns:
        ``loss`` and, of MTP modules, ``loss_2`` … [nats per token], ``perplexity``, ``bits_per_byte``, ``tokens``
        (next-token targets counted), ``bytes`` (of UTF-8 that these stand for), ``bytes_exact`` (whether every token's
        bytes are known), ``window``, ``stride``, ``windows``, ``data``.

    Raises:
        UserError: a window that does not fit the text, the model or the stride, ids that the model does not know, or
            a loss that is not finite.
    """
    heads = 1 + (model.config.num_mtp_modules if isinstance(model, VirtualWidthForCausalLM) else 0)
    window = _check_window(model, text, window, heads)
    stride = stride or window
    if max_tokens is not None and max_tokens < window:
        raise UserError(f"--max-tokens {max_tokens} is less than one window of {window}; raise it, or lower --window")
    if stride > window:
        raise UserError(f"--stride must be at most the window of {window}, got {stride}")
    windows, limit = (len(text.tokens) - window) // stride + 1, max_tokens or text.max_tokens
    # As a training run's validation spreads them.
    starts = [index * stride for index in spread(range(windows), windows if limit is None else limit // stride)]
    lengths = byte_lengths(text.tokenizer)
    sums, counts, covered = torch.zeros(heads, dtype=torch.float64), [0] * heads, 0
    with tqdm(total=len(starts), desc="evaluating", unit="window") as bar:
        for first in range(0, len(starts), batch_size):
            part = starts[first : first + batch_size]
            ids = np.stack([text.tokens[s : s + window] for s in part]).astype(np.int64)
            _check_ids(ids, model.config.get_text_config().vocab_size)
            begins = [1 if s == 0 else max(1, window - stride) for s in part]
            for k, losses in enumerate(_losses(model, torch.from_numpy(ids).to(model.device), heads)):
                for row, begin in zip(losses, begins, strict=True):
                    counted = row[max(begin, k + 1) - k - 1 :]
                    sums[k] += counted.double().sum().cpu()
                    counts[k] += len(counted)
            covered += sum(int(lengths[row[begin:]].sum()) for row, begin in zip(ids, begins, strict=True))
            bar.update(len(part))
    means = [float(total) / count for total, count in zip(sums, counts, strict=True)]
    if not all(map(isfinite, means)):
        raise UserError(f"the model's loss on {text.name} is not finite: it has diverged; give an earlier checkpoint")
    parts = (text.tokens[i : i + 2**22] for i in range(0, len(text.tokens), 2**22))  # to save memory
    share = text.bytes / max(1, sum(int(lengths[part].sum()) for part in parts))
    return {
        "data": text.name,
        "loss": means[0],
        **{f"loss_{k}": mean for k, mean in enumerate(means[1:], 2)},
        "perplexity": exp(means[0]) if means[0] < 700 else float("inf"),
        "bits_per_byte": float(sums[0]) / log(2) / (covered * share) if covered else None,
        "tokens": counts[0],
        "bytes": round(covered * share),
        "bytes_exact": share == 1,
        "window": window,
        "stride": stride,
        "windows": len(starts),
    }


def _check_window(model: Any, text: EvaluationText, window: int | None, heads: int) -> int:
    """Return the window given, else the longest that text and model allow, up to ``DEFAULT_WINDOW``."""
    if window is None:
        window = min(DEFAULT_WINDOW, positions_of(model)[0] or DEFAULT_WINDOW, len(text.tokens))
    check_positions(model, window)
    if len(text.tokens) < window:
        raise UserError(
            f"the text {text.name} holds {len(text.tokens)} tokens, fewer than a window of {window}; give more text, "
            "or a shorter --window"
        )
    if window <= heads:
        raise UserError(f"a window of {window} tokens predicts nothing {heads} tokens ahead; take a longer one")
    return window


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if (largest := int(ids.max())) >= vocab_size:
        raise UserError(
            f"the text has token {largest}, the model knows {vocab_size} tokens; the tokenizer is not the model's own"
        )


@torch.no_grad()
def _losses(model: Any, ids: Tensor, heads: int) -> Iterator[Tensor]:
    """Yield cross-entropy of every target of each head: of head ``k`` ``[B, W - 1 - k]``, in float32."""
    out = model(input_ids=ids, use_cache=False, **{"output_mtp_logits": True} if heads > 1 else {})
    for k, logits in enumerate((out.logits, *(out.mtp_logits if heads > 1 else ()))):
        pairs = zip(logits, ids, strict=True)  # row by row, to save memory
        yield torch.stack([F.cross_entropy(row[: -1 - k].float(), t[1 + k :], reduction="none") for row, t in pairs])
