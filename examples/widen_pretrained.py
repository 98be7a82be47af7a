"""Widen a trained model, check that it computes the same, and train on: python examples/widen_pretrained.py TEXT OUT.

``--checkpoint DIR`` takes any causal language model over bytes; without it a small Llama that has learnt nothing.
"""

import argparse
from pathlib import Path

import torch
import vwn
from transformers import AutoModelForCausalLM, LlamaConfig


def small_llama(seed: int, folder: Path) -> Path:
    """A checkpoint that stands for a trained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Widen, compare logits, train some steps, save, load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    for name, default in {"m": 1, "n": 4, "steps": 100, "batch-size": 8, "window": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()

    data = torch.tensor(list(given.text.read_bytes()))
    if len(data) < given.window:
        parser.error(f"{given.text} has {len(data)} bytes; a window takes {given.window}")
    plain = AutoModelForCausalLM.from_pretrained(given.checkpoint or small_llama(given.seed, given.out / "plain"))
    with torch.no_grad():
        before = plain.eval()(data[None, : given.window]).logits  # the two share their weights from here on
    wide = vwn.widen(plain, m=given.m, n=given.n)
    with torch.no_grad():
        print(f"largest change of a logit: {(wide.eval()(data[None, : given.window]).logits - before).abs().max():.1e}")

    adam = torch.optim.AdamW(vwn.parameter_groups(wide, given.rate), betas=(0.9, 0.95))
    torch.manual_seed(given.seed)
    wide.train()
    for step in range(given.steps):
        starts = torch.randint(len(data) - given.window + 1, (given.batch_size,)).tolist()
        ids = torch.stack([data[i : i + given.window] for i in starts])
        loss = wide(input_ids=ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % max(1, given.steps // 10) == 0 or step == given.steps - 1:
            print(f"step {step + 1:5d}  loss {loss.item():.3f}")

    wide.save_pretrained(given.out / "wide")
    AutoModelForCausalLM.from_pretrained(given.out / "wide")
    print(f"saved and loaded: {given.out / 'wide'}")


if __name__ == "__main__":
    main()
