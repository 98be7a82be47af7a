"""Losses that are silently wrong if heads, documents or trainers are mixed up: against documents alone, in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tiny import build, token_ids, vwn_config
from vwn import UserError
from vwn.hf import MultiTokenTrainerMixin
from vwn.hf.documents import number_documents
from vwn.hf.loss import targets_of_heads

LENGTHS = (9, 5, 2, 7)
NGRAMS = {"ngram_order": 3, "ngram_buckets": 50}


def wide(**fields):
    """With float64 everything but rounding is the same packed and alone."""
    model = build(vwn_config("llama", 2, 3, **{"num_mtp_modules": 2} | fields)).double()
    model.set_attn_implementation("sdpa")
    return model


def documents() -> list[Tensor]:
    return [token_ids(1, length, seed=length) for length in LENGTHS]


def packed(how: str) -> dict[str, Tensor]:
    """One row of all documents, told apart in one of the ways that trainers have."""
    ids = torch.cat(documents(), dim=1)
    labels = torch.cat([torch.cat([torch.full_like(d[:, :1], -100), d[:, 1:]], dim=1) for d in documents()], dim=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    index = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    block = ((index[..., None] == index[:, None]) & torch.ones(index.shape[1], index.shape[1]).tril().bool())[:, None]
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if how == "4-D mask":
        return row | {"attention_mask": block}
    if how == "4-D mask alone":  # rotary embeddings are relative: positions may run through
        return {"input_ids": ids, "labels": labels, "attention_mask": block}
    if how == "additive 4-D mask":
        lowest = torch.finfo(torch.float64).min
        return row | {"attention_mask": torch.zeros(block.shape, dtype=torch.float64).masked_fill(~block, lowest)}
    if how == "collator":
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        return dict(collate([{"input_ids": d[0].tolist()} for d in documents()]))
    return row


WAYS = ["positions", "4-D mask", "4-D mask alone", "additive 4-D mask", "collator"]


@pytest.mark.parametrize("how", WAYS)
def test_packed_documents_have_the_loss_of_the_documents_alone(how):
    model = wide(**NGRAMS)
    alone = [model(d, labels=d, output_mtp_logits=True) for d in documents()]
    counts = torch.tensor([[max(0, length - 1 - k) for length in LENGTHS] for k in range(3)])
    wanted = [
        sum(float(out.losses[k]) * int(n) for out, n in zip(alone, counts[k], strict=True) if n) / int(counts[k].sum())
        for k in range(3)
    ]
    row = packed(how)
    out = model(**row, use_cache=False)
    close = {"rtol": 1e-5, "atol": 1e-5}  # angles of rotary embeddings and losses are float32
    assert_close(out.logits, torch.cat([out.logits for out in alone], dim=1), **close)
    assert_close(torch.stack(out.losses), torch.tensor(wanted), **close)
    assert_close(float(out.loss), wanted[0] + 0.3 * (wanted[1] + wanted[2]), **close)
    out = model(**row, use_cache=False, num_items_in_batch=counts[0].sum())
    assert_close(float(out.loss), wanted[0] + 0.3 * (wanted[1] + wanted[2]), **close)


@pytest.mark.parametrize("tell", ["cu_seq_lens_q", "seq_idx"])
def test_each_key_of_the_padding_free_collator_tells_documents_apart(tell):
    """Where attention goes by it, positions need not restart. Targets alone: eager attention does not read it."""
    row = packed("collator")
    wanted = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    assert torch.equal(number_documents(row["input_ids"].shape, **{tell: row[tell]}), wanted)
    positions = torch.tensor([[0, 0, 1, 2, 0]])  # the first has one token
    assert number_documents((1, 5), torch.ones(1, 5), positions).tolist() == [[0, 1, 1, 1, 2]]


def test_no_module_has_a_target_in_another_document():
    found = targets_of_heads(3, torch.arange(1, 7)[None], documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    nothing = [-100] * 6
    assert [t[0].tolist() for t in found] == [[2, 3, 4, 5, 6, -100], [3, -100, -100, 6, -100, -100], nothing]


def test_left_padding_and_strided_positions_are_no_documents():
    model = wide(**NGRAMS)
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    strided = {"position_ids": torch.arange(0, 16, 2)[None].expand(2, 8), "attention_mask": mask}
    plain = {"position_ids": torch.arange(8)[None], "attention_mask": mask}
    assert_close(model(ids, labels=ids, **plain).losses, model(ids, labels=ids).losses)
    assert torch.equal(*[model.model(ids, **given).initial_state for given in (strided, plain)])


def test_lambda_is_lambda_where_labels_are_masked():
    model = wide()
    ids = token_ids(3, 16)
    labels = ids.clone()
    labels[0, :12] = labels[1, 2:9] = labels[2, -3:] = -100
    plain = model(ids, labels=labels).loss
    assert_close(model(ids, labels=labels, num_items_in_batch=(labels[:, 1:] != -100).sum()).loss, plain)
    assert_close(model(ids, labels=labels, num_items_in_batch=int((labels[:, 1:] != -100).sum())).loss, plain)


def test_shift_labels_are_followed():
    model = wide()
    ids, other = token_ids(2, 9), token_ids(2, 10, seed=5)
    shifted = torch.cat([other[:, 1:9], torch.full_like(ids[:, :1], -100)], dim=1)
    wanted = model(ids, labels=other[:, :9])
    out = model(ids, labels=ids, shift_labels=shifted)
    assert_close(out.losses, wanted.losses)
    assert_close(out.loss, wanted.loss)
    whole = other[:, 1:]  # the last position has a target as well
    logits = model(ids, labels=ids, output_mtp_logits=True)
    losses = model(ids, labels=ids, shift_labels=whole).losses
    for k, head in enumerate((logits.logits, *logits.mtp_logits)):
        entropy = torch.nn.functional.cross_entropy(head[:, : 9 - k].flatten(0, 1).float(), whole[:, k:].flatten())
        assert_close(losses[k], entropy)


def test_parts_of_sequences_are_refused():
    """Context parallelism: the second half of a sequence, whose first tokens' n-grams are on another process."""
    ids = token_ids(1, 8)
    part = {"position_ids": torch.arange(8, 16)[None], "labels": ids, "shift_labels": ids}
    for fields, what in (({"num_mtp_modules": 1}, "MTP modules"), ({"num_mtp_modules": 0} | NGRAMS, "n-grams")):
        model = wide(**fields)
        with pytest.raises(UserError, match=f"begins at position 8.*{what}"):
            model(ids, **part)
        model(ids, **part | {"position_ids": torch.arange(8)[None]})
    assert torch.isfinite(wide(num_mtp_modules=0)(ids, **part).loss)
    model = wide(num_mtp_modules=1)
    before = model(ids, use_cache=True).past_key_values
    assert model(ids, **part, past_key_values=before).loss.isfinite()  # the first half is in the cache


# Trainers


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def collate(examples):
    length = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (length - len(e["input_ids"])) for e in examples])
    mask = torch.tensor([[1] * len(e["input_ids"]) + [0] * (length - len(e["input_ids"])) for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(tmp_path, trainer_class, batch_size, **options):
    """Of one step, of SGD at rate 1."""
    model = build(vwn_config("llama", 2, 3, num_mtp_modules=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        output_dir=tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
        max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (64, 8, 6, 4)]
    trainer_class(model=model, args=args, train_dataset=Rows(rows), data_collator=collate).train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def test_accumulation_by_trainer_gives_the_gradients_of_one_batch(tmp_path):
    class Exact(MultiTokenTrainerMixin, Trainer):
        pass

    whole = gradients(tmp_path, Trainer, 4)
    parts = gradients(tmp_path, Exact, 1)
    for name, gradient in whole.items():
        assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda s, n=name: f"{n}: {s}")
    together = gradients(tmp_path, Exact, 4)
    assert all(torch.allclose(together[name], whole[name], atol=1e-6) for name in whole)


@pytest.mark.parametrize(
    ("modules", "masked", "counted", "warned"),
    [
        (1, True, lambda count: 2 * count, True),
        (1, True, lambda count: count, False),
        (1, False, lambda count: 2 * count, False),
        (1, True, lambda count: torch.stack([2 * count, 2 * count]), False),
    ],
    ids=["batches", "one-batch", "equal-rows", "each-head"],
)
def test_shares_of_the_targets_are_warned_of_once(caplog, modules, masked, counted, warned):
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=modules)).train()
    ids, labels = token_ids(), token_ids().clone()
    if masked:
        labels[0, :3] = -100
    count = (labels[:, 1:] != -100).sum()
    for _ in range(2):
        model(ids, labels=labels, num_items_in_batch=counted(count))
    assert len([record.message for record in caplog.records if "MultiTokenTrainerMixin" in record.message]) == warned


def test_modules_that_no_loss_trains_are_named_once(caplog):
    model, ids = build(vwn_config(num_mtp_modules=1)).train(), token_ids()
    with caplog.at_level(logging.WARNING, "vwn.hf"):
        model(ids, labels=ids)
        model(ids, output_mtp_logits=True)
        with torch.no_grad():
            model(ids)
        model.generate(ids[:1], max_new_tokens=2, do_sample=False)
        model.eval()(ids)
        assert not caplog.records
        for _ in range(2):
            model.train()(ids)
    assert len(caplog.records) == 1
    assert "MTP modules (num_mtp_modules = 1) are not trained" in caplog.text
    caplog.clear()
    frozen = build(vwn_config(num_mtp_modules=1)).train()
    frozen.model.mtp.requires_grad_(False)
    frozen(ids)
    build(vwn_config(num_mtp_modules=0)).train()(ids)
    assert not caplog.records
    build(vwn_config(num_mtp_modules=1)).train().base_model(ids)  # what TRL runs, with a head of its own
    assert "are not trained" in caplog.text


def test_a_loss_from_outside_can_train_them():
    """The documented way: the loss of the model's own forward, and its gradients."""
    model, ids = build(vwn_config(num_mtp_modules=2)).train(), token_ids()
    labels = ids.clone()
    labels[0, 3:6] = -100
    items = 3 * (labels[:, 1:] != -100).sum()
    wanted = model(ids, labels=labels, num_items_in_batch=items).loss
    model.output_mtp_logits = True
    out = model(ids)
    outside = model.loss_function(out.logits, labels, model.config.vocab_size, num_items_in_batch=items)
    loss = outside + model.mtp_loss(out.mtp_logits, labels, items)
    assert_close(loss, wanted)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.model.mtp.parameters())


def test_label_smoothing_by_trainer_shifts_the_labels(tmp_path):
    """It shifts for classes whose names transformers knows as causal."""
    plain = build(vwn_config("llama", 2, 3))
    args = TrainingArguments(output_dir=tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    ids = token_ids()
    trainer = Trainer(model=plain, args=args)
    loss = trainer.compute_loss(plain, {"input_ids": ids, "labels": ids})
    log_probs = plain(ids).logits[:, :-1].log_softmax(-1)
    assert_close(loss, -0.9 * log_probs.gather(-1, ids[:, 1:, None]).mean() - 0.1 * log_probs.mean())
