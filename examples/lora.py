"""LoRA adapters and connections trained, the widened model's own weights frozen: python examples/lora.py TEXT OUT."""

import argparse
from pathlib import Path

import torch
import vwn
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig


def main() -> None:
    """Widen, attach adapters, train them and the connections, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="a causal language model over bytes; a small Llama without it")
    for name, default in {"m": 1, "n": 4, "rank": 8, "steps": 100, "batch-size": 8, "window": 128, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    given = parser.parse_args()

    data = torch.tensor(list(given.text.read_bytes()))
    if len(data) < given.window:
        parser.error(f"{given.text} has {len(data)} bytes; a window takes {given.window}")

    torch.manual_seed(given.seed)
    new = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    if given.checkpoint:
        plain = AutoModelForCausalLM.from_pretrained(given.checkpoint)
    else:
        plain = AutoModelForCausalLM.from_config(new)
    lora = LoraConfig(r=given.rank, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(vwn.widen(plain, m=given.m, n=given.n), lora)
    # At their start the connections are the plain residual stream; without training them the width is of no use.
    for name, parameter in model.named_parameters():
        if ".connections." in name:
            parameter.requires_grad_(True)
    model.print_trainable_parameters()

    adam = torch.optim.AdamW(vwn.parameter_groups(model, given.rate, weight_decay=0.0))
    for step in range(given.steps):
        starts = torch.randint(len(data) - given.window + 1, (given.batch_size,)).tolist()
        ids = torch.stack([data[i : i + given.window] for i in starts])
        loss = model(input_ids=ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % max(1, given.steps // 10) == 0 or step == given.steps - 1:
            print(f"step {step + 1:5d}  loss {loss.item():.3f}")
    model.merge_and_unload().save_pretrained(given.out)  # adapters alone would leave the connections out
    print(f"saved: {given.out}")


if __name__ == "__main__":
    main()
