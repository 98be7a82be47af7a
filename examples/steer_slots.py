"""Read the states of each slot, and steer one: python examples/steer_slots.py CHECKPOINT "Some text" --slot 5."""

import argparse

import torch
import vwn.hf  # noqa: F401  # registers the model with transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_slots(model: nn.Module, ids: Tensor) -> Tensor:
    """Every state of the backbone by slot, ``[sublayers, batch, tokens, n, d]``, each as its sublayer reads it."""
    states: list[Tensor] = []
    connections = [connection for layer in model.model.layers for connection in layer.connections]
    hooks = [
        connection.read.register_forward_hook(
            lambda read, args, x: states.append(args[0].unflatten(-1, (read.connection.geometry.n, -1)))
        )
        for connection in connections
    ]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states)


def steer(model: nn.Module, sublayer: int, slot: int, direction: Tensor) -> torch.utils.hooks.RemovableHandle:
    """From now on add ``direction`` ``[d]`` to one slot of what a sublayer writes; ``remove()`` the result to stop."""
    connections = [connection for layer in model.model.layers for connection in layer.connections]

    def change(write: nn.Module, args: tuple, state: Tensor) -> Tensor:
        slots = state.unflatten(-1, (write.connection.geometry.n, -1)).clone()
        slots[..., slot, :] += direction.to(slots)
        return slots.flatten(-2)

    return connections[sublayer].write.register_forward_hook(change)


def main() -> None:
    """Print the RMS of every slot, and what steering one does to the next token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--sublayer", type=int, default=0, help="whose write is changed, from 0")
    parser.add_argument("--slot", type=int, default=0, help="the slot that is changed, from 0")
    parser.add_argument("--strength", type=float, default=2.0, help="as a multiple of the slot's mean over the text")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    ids = tokenizer(given.text, return_tensors="pt").input_ids
    states = read_slots(model, ids)
    for number, rms in enumerate(states.square().mean((1, 2, 4)).sqrt()):
        print(f"sublayer {number:2d}  RMS by slot  " + " ".join(f"{value:6.2f}" for value in rms.tolist()))
    direction = given.strength * states[given.sublayer, ..., given.slot, :].mean((0, 1))
    with torch.no_grad():
        before = model(ids).logits[0, -1].softmax(-1)
        handle = steer(model, given.sublayer, given.slot, direction)
        after = model(ids).logits[0, -1].softmax(-1)
        handle.remove()
    for token in (after - before).abs().topk(5).indices:
        name = tokenizer.decode(token)
        print(f"next token {name!r}: {before[token]:.3f} before, {after[token]:.3f} steered")


if __name__ == "__main__":
    main()
