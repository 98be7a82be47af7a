"""What the connections keep for the backward, per token and sublayer, against ``(r+1) D e``.

A chain of connections whose sublayers keep nothing (they negate) keeps only what is theirs; what whole models keep is
in ``benchmarks.training_step``.

And the most that a training step holds above its parameters, with the logits of every head in memory and with
the chunked loss and Liger-Kernel's, which never hold them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import listing, measure, models
from benchmarks.models import Training
from benchmarks.report import NOT_MEASURED, Report, parser
from benchmarks.rivals import mapped
from vwn import GeneralizedHyperConnection, ops
from vwn.common.errors import UserError
from vwn.hf.lookahead import Lookahead, Reader
from vwn.hf.loss import choose_loss

SHAPES = [(2, 3), (4, 8), (4, 16), (8, 64)]
KEEP = (1, 2, 4, 8)
# lengths whose difference is a multiple of every K, so that no incomplete group is counted
SUBLAYERS = 8, 24
NOTES = {
    "saved": "bytes per token and sublayer that are allocated after the forward, slope over two depths",
    "share of bound": "over (r+1)De, the state and the sublayer's output",
    "chain": "sublayers keep nothing themselves",
    "loss": "peak of forward and backward with all gradients, per token; 'logits' are those of one head, as stored",
    "not seen": "what the C++ backend allocates for itself while it runs, which is never kept",
}
COLUMNS = {
    "where": "6s",
    "connection": "10s",
    "width": "6d",
    "who": "14s",
    "keep_states_every": "17d",
    "saved_bytes": "11.0f",
    "bound_bytes": "11.0f",
    "share_of_bound": "14.3f",
    "logits_bytes": "12.0f",
    "peak_bytes": "11.0f",
    "loss": "9.5f",
}


def main() -> None:
    """Measure, show, write."""
    options = parser("memory", __doc__).parse_args()
    measure.settle(1 if options.device == "cpu" else torch.get_num_threads())
    report = Report(options, NOTES, COLUMNS)
    native = "triton" if options.device == "cuda" or options.backend == "triton" else "compiled"
    for shape in options.shapes or (SHAPES[:1] if options.quick else SHAPES):
        for who in ("reference", native, "listing"):
            for keep in KEEP[:1] if who == "listing" else KEEP[::2] if options.quick else KEEP:
                report.add(_chain(shape, who, keep, options))
    for who in ("torch", "chunked", "liger"):
        report.add(_loss(who, options))
    report.done()


def _chain(shape: tuple[int, int], who: str, keep: int, options: argparse.Namespace) -> dict[str, Any]:
    width = 64 if options.quick else 2048 if options.device == "cuda" else 512
    tokens = 16 if options.quick else 8192 if options.device == "cuda" else 256
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    labels = {"where": "chain", "connection": list(shape), "width": width, "who": who, "keep_states_every": keep}
    try:
        if who != "listing":
            ops.choose(who, device, dtype, shape[1])
    except UserError as error:
        return labels | {NOT_MEASURED: str(error)}
    backend = "auto" if who == "listing" else who
    connections = [GeneralizedHyperConnection(width, *shape, backend=backend).to(device) for _ in range(max(SUBLAYERS))]
    state = torch.randn(tokens, connections[0].geometry.over_width, device=device).to(dtype).requires_grad_()
    run = _listing_chain if who == "listing" else _op_chain
    saved = _slope({count: partial(run, state, connections[:count], keep) for count in SUBLAYERS}, device)
    bound = (shape[1] / shape[0] + 1) * width * dtype.itemsize
    saved /= tokens
    return labels | {"saved_bytes": saved, "bound_bytes": bound, "share_of_bound": saved / bound}


def _op_chain(state: Tensor, connections: list[GeneralizedHyperConnection], keep: int) -> Tensor:
    lookahead = Lookahead(keep_every=keep)
    readers = [Reader(c) for c in connections]
    x = lookahead.read(state, readers[0])
    for reader, following in pairwise(readers):
        state, x = lookahead.write_read(state, -x, reader.connection, following)
    return lookahead.write(state, -x, readers[-1].connection)


def _listing_chain(state: Tensor, connections: list[GeneralizedHyperConnection], keep: int) -> Tensor:
    dtype = state.dtype
    for connection in connections:
        w = mapped(connection.weights, lambda t: t.to(dtype))
        x, carried, beta = listing.width_connection(state, w)
        state = listing.depth_connection(carried, beta, -x)
    return state


def _slope(calls: dict[int, Callable[[], Any]], device: torch.device) -> float:
    """Bytes that are live after each call, per unit of what the calls differ in."""
    live = {}
    for size, call in calls.items():
        call()  # what the first call leaves behind is not of the forward
        result, memory = measure.memory_of(call, device)
        live[size] = memory.live
        del result
    small, large = min(live), max(live)
    return (live[large] - live[small]) / (large - small)


def _loss(who: str, options: argparse.Namespace) -> dict[str, Any]:
    connection, mtp = (4, 8), 1
    size = models.preset("dense", options.device, options.quick)
    vocab = 512 if options.quick else 131072 if options.device == "cuda" else 32768
    batch = (4, 32) if options.quick else models.tokens(options.device, options.quick)
    labels = {"where": "loss", "connection": list(connection), "width": size.width, "who": who, "vocabulary": vocab}
    try:
        choose_loss(who, torch.device(options.device))
    except UserError as error:
        return labels | {NOT_MEASURED: str(error)}
    training = Training(size, connection, options.device, batch, options.backend, who, mtp, vocab=vocab)

    def backward() -> Tensor:
        training.optimizer.zero_grad(set_to_none=True)
        loss = training.loss()
        loss.backward()
        return loss.detach()

    backward()  # what the first call compiles and leaves behind
    training.optimizer.zero_grad(set_to_none=True)
    loss, memory = measure.memory_of(backward, torch.device(options.device))
    tokens = batch[0] * batch[1]
    logits = vocab * training.model.lm_head.weight.element_size()
    return labels | {
        "heads": 1 + mtp,
        "tokens": tokens,
        "logits_bytes": logits,
        "peak_bytes": memory.peak / tokens,
        "loss": loss.item(),
    }


if __name__ == "__main__":
    main()
