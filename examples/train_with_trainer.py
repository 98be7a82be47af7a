"""Hugging Face's Trainer on a model with virtual width: python examples/train_with_trainer.py TEXT OUT."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, set_seed
from vwn import parameter_groups
from vwn.hf import VirtualWidthConfig


def windows(text: Path, length: int) -> list[dict[str, torch.Tensor]]:
    """The bytes of a file, cut into training examples."""
    data = torch.tensor(list(text.read_bytes()))
    if len(data) < length:
        raise SystemExit(f"{text} has {len(data)} bytes; a window takes {length}")
    return [{"input_ids": ids, "labels": ids} for ids in data.split(length) if len(ids) == length]


def main() -> None:
    """Train, save, load again and continue a prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    sizes = {"steps": 300, "batch-size": 8, "window": 128, "width": 128, "layers": 4, "m": 4, "n": 16, "seed": 0}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    set_seed(given.seed)
    backbone = LlamaConfig(
        vocab_size=256,
        hidden_size=given.width,
        intermediate_size=3 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=given.width**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(VirtualWidthConfig(backbone=backbone, m=given.m, n=given.n))
    arguments = TrainingArguments(
        output_dir=str(given.out),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, given.steps // 20),
        logging_steps=max(1, given.steps // 10),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=given.seed,
    )
    data = windows(given.text, given.window)
    # Trainer's own groups would give everything the same rate.
    adam = torch.optim.AdamW(parameter_groups(model, lr=3e-3), betas=(0.9, 0.95))
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(adam, None))
    print(f"mean loss {trainer.train().training_loss:.3f} nats per byte")
    trainer.save_model()

    loaded = AutoModelForCausalLM.from_pretrained(given.out)
    prompt = data[0]["input_ids"][None, :16]
    print(bytes(loaded.generate(prompt, max_new_tokens=32)[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
