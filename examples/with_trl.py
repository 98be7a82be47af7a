"""Fine-tune a widened model with TRL: python examples/with_trl.py {sft,dpo,reward} OUT [--checkpoint FOLDER].

``sft`` packs texts and trains all weights, ``dpo`` trains LoRA adapters, ``reward`` trains a reward model. Without a
checkpoint it is a small Llama that has learnt nothing, over the words of the texts below.
"""

import argparse
from pathlib import Path

import vwn
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TEXTS = ["the cat sat on the mat", "a dog ran", "the dog sat", "a cat ran on the mat"] * 8
PREFERENCES = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran ran"},
    {"prompt": "a dog", "chosen": " ran on the mat", "rejected": " the the"},
] * 8


class ModelLossTrainer(SFTTrainer):
    """SFT with the model's own loss, of which MTP modules are a part; TRL's is of the next token alone."""

    compute_loss = Trainer.compute_loss


def small_checkpoint(folder: Path) -> Path:
    """A widened model with an MTP module, and a tokenizer, that stand for trained ones."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    plain = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    wide = vwn.widen(AutoModelForCausalLM.from_config(plain), m=2, n=3, num_mtp_modules=1)
    wide.save_pretrained(folder)
    return folder


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["sft", "dpo", "reward"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    set_seed(0)
    checkpoint = given.checkpoint or small_checkpoint(given.out / "start")
    shared = dict(output_dir=str(given.out), max_steps=given.steps, per_device_train_batch_size=4, logging_steps=1)
    shared |= dict(report_to="none", save_strategy="no", bf16=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if given.task == "sft":
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        data = Dataset.from_list([{"text": text} for text in TEXTS])
        config = SFTConfig(packing=True, max_length=32, **shared)
        trainer = ModelLossTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    elif given.task == "dpo":
        # The reference is the model without adapters: connections that were trained as well would change it.
        model = AutoModelForCausalLM.from_pretrained(checkpoint, num_mtp_modules=0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        data = Dataset.from_list(PREFERENCES)
        config = DPOConfig(max_length=32, **shared)
        trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
        data = Dataset.from_list(PREFERENCES)
        config = RewardConfig(max_length=32, **shared)
        trainer = RewardTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    result = trainer.train()
    trainer.save_model()
    print(f"{given.task}: {result.global_step} steps, mean loss {result.training_loss:.3f}, saved: {given.out}")


if __name__ == "__main__":
    main()
