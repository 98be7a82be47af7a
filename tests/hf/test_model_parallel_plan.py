"""Tensor-parallel and FSDP plans: the backbone's, with state and routing replicated; two processes equal one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from conftest import perturb
from processes import Processes
from tiny import backbone_config, build, token_ids, vwn_config

SIZES = {"vocab_size": 62, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 4, "intermediate_size": 48}


def equals_one(config: str, paths: list[str]) -> None:
    """What each of two processes does; with a bfloat16 model the routing stays in float32, sharded or not."""
    for path in paths:
        expected = torch.load(path + "/expected.pt")
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**json.loads(config)))
        half = model.dtype == torch.bfloat16
        for name, p in model.named_parameters():
            assert p.dtype == (torch.bfloat16 if half and ".connections." not in name else torch.float32), name
        close = {"rtol": 1e-2, "atol": 2e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
        sharded = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
        assert any("q_proj" in name for name in sharded), sharded
        if "tp_plan" in config:
            assert not [name for name in sharded if "connections" in name or "reduce" in name], sharded
        out = model(expected["ids"], labels=expected["ids"])
        assert_close(whole(out.logits), expected["logits"], **close)
        assert_close(whole(out.loss), expected["loss"], **close)
        out.loss.backward()
        for name, p in model.named_parameters():
            got, wanted = whole(p.grad).float(), expected["grads"][name].float()
            assert (got - wanted).norm() <= (1e-2 if half else 1e-4) * (1e-6 + wanted.norm()), name
        assert half or torch.equal(
            model.generate(expected["ids"], max_new_tokens=3, do_sample=False), expected["generated"]
        )
        model.save_pretrained(path + "/again")
        dist.barrier()
    dist.destroy_process_group()


def whole(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@pytest.mark.slow
@pytest.mark.parametrize("config", ['{"tp_plan": "auto"}', '{"fsdp_size": 2}'], ids=["tensor", "fsdp"])
def test_two_processes_equal_one(tmp_path, config):
    tied = {"embedding": "factorised", "tie_word_embeddings": True}
    streams = {"m": 1, "n": 2, "embedding": "replicated", "reduce": "sum"}
    kinds = [("llama", tied, torch.float32)]
    if "fsdp" in config:  # which shards the routing as well, in units of its own
        kinds += [("llama", streams | {"connection": kind}, torch.bfloat16) for kind in ("hc", "mhc")]
        kinds += [("llama", {"num_mtp_modules": 1}, torch.bfloat16)]
    else:
        kinds += [("mixtral", {"num_mtp_modules": 1}, torch.float32)]
    models, paths = [], []
    for i, (kind, fields, dtype) in enumerate(kinds):
        wide, path = vwn_config(kind, **{"m": 2, "n": 4} | fields, backbone=SIZES), tmp_path / str(i)
        model = perturb(AutoModelForCausalLM.from_config(wide, dtype=dtype)).eval()
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
    with Processes(equals_one, config, paths, shim=False, log=tmp_path / "log") as processes:
        assert processes.wait(600) == [0, 0], processes.said()
    for model, path in zip(models, paths, strict=True):
        again = AutoModelForCausalLM.from_pretrained(path + "/again")
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize(("kind", "connection"), [("mixtral", "ghc"), ("llama", "residual")])
def test_the_plan_is_the_backbones(kind, connection):
    width = (1, 1) if connection == "residual" else (2, 4)
    model = build(vwn_config(kind, *width, connection=connection, num_mtp_modules=1))
    wanted = {f"model.backbone.{name}": style for name, style in backbone_config(kind).base_model_tp_plan.items()}
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
