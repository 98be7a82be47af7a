"""What other libraries ask of a model: embeddings, sizes, heads of other tasks, options by their right names."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForSequenceClassification,
)

from conftest import perturb
from tiny import backbone_config, build, token_ids, vwn_config
from vwn import VirtualWidthConfig, VirtualWidthForCausalLM, widen
from vwn.hf.checkpoint.saving import NOT_PLAIN

# Embeddings


@pytest.mark.parametrize(
    "fields",
    [
        {"embedding": "replicated", "m": 2, "n": 3},
        {"embedding": "factorised", "m": 2, "n": 3},
        {"embedding": "direct", "m": 2, "n": 3},
        {"m": 1, "n": 1, "connection": "residual", "table_factor": 2},
    ],
    ids=lambda fields: fields.get("embedding", "table factor"),
)
def test_rows_of_the_table_stand_for_their_tokens(fields):
    model, ids = build(vwn_config("llama", **fields)), token_ids()
    rows = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=rows).logits, model(ids).logits)
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    new = model.generate(inputs_embeds=rows, attention_mask=torch.ones_like(ids), **greedy)
    assert torch.equal(new, model.generate(ids, **greedy)[:, 9:])


@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder", "PrefixTuning"])
@pytest.mark.parametrize("embedding", ["replicated", "direct"])
def test_prompt_tuning_asks_for_no_sizes_but_the_row_of_a_direct_table(kind, embedding):
    peft = pytest.importorskip("peft")
    model = widen(AutoModelForCausalLM.from_config(backbone_config()), m=2, n=3, embedding=embedding)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if embedding == "direct" and kind != "PrefixTuning":
        options["token_dim"] = model.get_input_embeddings().embedding_dim
    tuned = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**options))
    ids = token_ids()
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


# Config


def test_sizes_of_the_backbone_are_those_of_the_config():
    config = vwn_config("mixtral")
    for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "head_dim"):
        assert getattr(config, name) == getattr(config.backbone, name)
    assert config.num_local_experts == 4
    assert not hasattr(vwn_config("llama"), "num_local_experts")
    assert config.to_dict()["num_attention_heads"] == 4
    assert "num_attention_heads" not in json.loads(config.to_json_string())
    assert VirtualWidthConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mtp": 1}, "no option 'mtp'; did you mean num_mtp_modules?"),
        ({"static": True}, "no option 'static'; did you mean dynamic=False?"),
        ({"embeding": "factorised"}, "no option 'embeding'; did you mean embedding?"),
        ({"num_mtp_module": 1}, "did you mean num_mtp_modules?"),
        ({"rope_parameters": {}}, "no option 'rope_parameters'; if it is the backbone's, set it in the backbone's"),
    ],
)
def test_an_unknown_option_is_refused(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VirtualWidthConfig(backbone=backbone_config(), m=2, n=4, **option)


def test_options_of_any_config_are_taken(tmp_path):
    config = VirtualWidthConfig(
        backbone=backbone_config(), m=2, n=4, num_labels=3, attn_implementation="eager", pad_token_id=5, temperature=2.0
    )
    assert (config.num_labels, config._attn_implementation, config.pad_token_id) == (3, "eager", 5)
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"another_librarys": "note"}))
    assert VirtualWidthConfig.from_pretrained(tmp_path).another_librarys == "note"


def test_a_padding_token_set_later_reaches_the_backbone():
    """Trainers of reward models set it, and transformers' heads read the backbone's."""
    config = VirtualWidthConfig(backbone=backbone_config(pad_token_id=None), m=2, n=4, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match="padding token"):
        model(token_ids())
    model.config.pad_token_id = 0
    assert model(token_ids()).logits.shape == (2, 1)


def test_saving_leaves_the_config_alone(tmp_path):
    model = build(vwn_config(num_mtp_modules=1))
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == before
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["transformers_weights"] == NOT_PLAIN
    loaded = VirtualWidthForCausalLM.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(loaded.config.backbone).save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


# Heads of other tasks

HEADS = {
    "score": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
}


@pytest.mark.parametrize("task", HEADS)
def test_a_head_on_a_language_models_weights(task, tmp_path):
    trained, ids = build(vwn_config(num_mtp_modules=1)), token_ids()
    trained.save_pretrained(tmp_path)
    model = perturb(HEADS[task].from_pretrained(tmp_path, num_labels=3, dtype=torch.float32), 1, 0.0)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(weight, trained.model.state_dict()[name]), name
    states = trained.model(ids).last_hidden_state
    out = model(ids)
    if task == "score":
        assert_close(out.logits, model.score(states[:, -1]))
        loss = model(ids, labels=torch.tensor([0, 2])).loss
        assert_close(loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))
    elif task == "tag":
        assert_close(out.logits, model.score(states))
        loss = model(ids, labels=ids % 3).loss
    else:
        assert_close(torch.stack([out.start_logits, out.end_logits], -1), model.qa_outputs(states))
        loss = model(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 4])).loss
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.save_pretrained(tmp_path / "own")
    again = HEADS[task].from_pretrained(tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(again(ids)[:1], model(ids)[:1], strict=True))
    assert again.get_input_embeddings() is again.model.embed_tokens.table


def test_padding_goes_as_in_a_plain_reward_model():
    plain = perturb(LlamaForSequenceClassification(backbone_config(num_labels=1)))
    config = vwn_config("llama", 1, 1, connection="residual", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    names = {name.replace("model.backbone.", "model.").replace(".table.", "."): name for name in model.state_dict()}
    model.load_state_dict({names[name]: value for name, value in plain.state_dict().items() if name in names})
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    ids = ids * mask
    assert torch.equal(model.eval()(ids, attention_mask=mask).logits, plain.eval()(ids, attention_mask=mask).logits)
