"""Tensor-parallel and FSDP plans: the backbone's, with state and routing replicated; two processes equal one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from processes import free_port
from tiny import BACKBONES, backbone_config, build, token_ids, vwn_config
from vwn.hf import VirtualWidthConfig

SIZES = {"vocab_size": 62, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 4, "intermediate_size": 48}

TWO = """
import json, os, sys, torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import vwn.hf

def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t

torch.set_num_threads(1)
for path in sys.argv[2:]:
    expected = torch.load(path + "/expected.pt")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**json.loads(sys.argv[1])))
    sharded = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert any("q_proj" in name for name in sharded), sharded
    if "tp_plan" in sys.argv[1]:
        assert not [name for name in sharded if "connections" in name or "reduce" in name], sharded
    out = model(expected["ids"], labels=expected["ids"])
    torch.testing.assert_close(whole(out.logits), expected["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole(out.loss), expected["loss"], rtol=1e-5, atol=1e-5)
    out.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole(p.grad), expected["grads"][name], rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(model.generate(expected["ids"], max_new_tokens=3, do_sample=False), expected["generated"])
    model.save_pretrained(path + "/again")
    dist.barrier()
print("rank", dist.get_rank(), "equal")
dist.destroy_process_group()
"""


def run_two(config: str, paths: list[str]) -> None:
    """The script above on two gloo processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, config, *paths],
            env=env | {"RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for k in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for k, output in enumerate(outputs):
        assert f"rank {k} equal" in output, output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("config", ['{"tp_plan": "auto"}', '{"fsdp_size": 2}'], ids=["tensor", "fsdp"])
def test_two_processes_equal_one(tmp_path, config):
    kinds = [("llama", {"num_mtp_modules": 1}), ("llama", {"embedding": "factorised", "tie_word_embeddings": True})]
    kinds += [("mixtral", {})] if "tp_plan" in config else []
    models, paths = [], []
    for i, (kind, fields) in enumerate(kinds):
        model, path = build(vwn_config(kind, 2, 4, SIZES, **fields)), tmp_path / str(i)
        model.save_pretrained(path)
        ids = token_ids()
        out = model(ids, labels=ids)
        out.loss.backward()
        expected = {"ids": ids, "logits": out.logits.detach(), "loss": out.loss.detach()}
        expected["grads"] = {name: p.grad for name, p in model.named_parameters()}
        expected["generated"] = model.generate(ids, max_new_tokens=3, do_sample=False)
        torch.save(expected, path / "expected.pt")
        models.append(model)
        paths.append(str(path))
    run_two(config, paths)
    for model, path in zip(models, paths, strict=True):
        again = AutoModelForCausalLM.from_pretrained(path + "/again")
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(("kind", "connection"), [(kind, "ghc") for kind in BACKBONES] + [("llama", "residual")])
def test_the_plan_is_the_backbones(kind, connection):
    width = (1, 1) if connection == "residual" else (2, 4)
    model = build(vwn_config(kind, *width, connection=connection, num_mtp_modules=1))
    theirs = backbone_config(kind).base_model_tp_plan
    wanted = {f"model.backbone.{name}": style for name, style in theirs.items()}
    wanted |= {"model.embed_tokens.table": "embedding_rowwise", "lm_head": "colwise_gather_output"}
    assert model._tp_plan == wanted
    assert model.model._tp_plan == {k.removeprefix("model."): v for k, v in wanted.items() if k != "lm_head"}
    assert model.supports_tp_plan
    assert not model.supports_pp_plan


def test_every_rule_of_the_plans_names_something():
    model = build(vwn_config("llama", 2, 4))
    names = {n.replace(".0.", ".*.").replace(".0", ".*") for n, _ in model.named_modules()}
    for plan in (model._tp_plan, model._fsdp_plan):
        assert set(plan) <= names
    assert model._fsdp_plan["model.backbone.layers.*"]


def test_a_plan_is_the_classs_and_not_part_of_the_file(tmp_path):
    config = vwn_config()
    assert "tp_plan" not in str(config.to_dict())
    config.save_pretrained(tmp_path)
    again = VirtualWidthConfig.from_pretrained(tmp_path)
    assert again.base_model_tp_plan == config.base_model_tp_plan
    assert "backbone.layers.*.self_attn.q_proj" in again.base_model_tp_plan
    assert again.base_model_pp_plan is None


def test_a_backbone_without_a_plan_has_none():
    class Unplanned(type(backbone_config())):
        base_model_tp_plan = None

    config = VirtualWidthConfig(backbone=Unplanned(**backbone_config().to_dict()), m=2, n=4)
    assert config.base_model_tp_plan == {}
