"""transformers' own FSDP and device maps: float32 routing in a bfloat16 model, connections without hooks."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM

from conftest import perturb
from processes import Processes
from tiny import build, token_ids, vwn_config
from vwn.nn.connection import Connection, has_hooks

KINDS = {
    "ghc": (2, 4, {"num_mtp_modules": 1}),
    "hc": (1, 2, {"connection": "hc", "embedding": "replicated", "reduce": "sum"}),
    "mhc": (1, 2, {"connection": "mhc", "embedding": "replicated", "reduce": "sum"}),
}


def sharded_equals_whole(folders):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    from vwn.hf import VirtualWidthForCausalLM

    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    dist.init_process_group("gloo")
    for folder in folders:
        whole = VirtualWidthForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = VirtualWidthForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, distributed_config=DistributedConfig(fsdp_size=2)
        )
        for each in (whole, model):
            each(ids, labels=ids).loss.backward()
        for (name, p), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(p, DTensor), name
            assert p.dtype is (torch.float32 if ".connections." in name else torch.bfloat16), name
            got = p.grad.full_tensor().float()
            assert (got - wanted.grad.float()).norm() <= 1e-2 * wanted.grad.float().norm(), name
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_bfloat16_model_shards_with_its_routing_in_float32(tmp_path):
    for name, (m, n, options) in KINDS.items():
        perturb(build(vwn_config("llama", m, n, **options))).save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in KINDS]
    with Processes(sharded_equals_whole, folders, shim=False, log=tmp_path / "log") as processes:
        assert processes.wait() == [0, 0], processes.said()


@pytest.mark.parametrize("offloaded", [False, True])
def test_device_maps_leave_connections_without_hooks(tmp_path, offloaded):
    """As with several GPUs: every module with weights would have a hook, and none of the fused passes would run."""
    model = perturb(build(vwn_config()))
    model.save_pretrained(tmp_path / "model")
    names = ["model.backbone.layers.0", "model.backbone.rotary_emb", "model.embed_tokens", "model.norm", "model.reduce"]
    places = dict.fromkeys([*names, "model.mtp", "lm_head", "unembed_expand"], "cpu")
    places["model.backbone.layers.1"] = "disk" if offloaded else "cpu"
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    if not offloaded:  # accelerate leaves its hooks out where all is on one device
        dispatch_model(again, places, main_device="cpu", force_hooks=True)
        from vwn.hf.checkpoint.saving import _free_connections

        _free_connections(again)
    assert hasattr(again.model.backbone.layers[1].mlp, "_hf_hook")
    assert not any(has_hooks(m, m.read, m.write) for m in again.modules() if isinstance(m, Connection))
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_accelerates_own_offloading_brings_the_weights_of_connections_in():
    model = perturb(build(vwn_config("llama", 2, 4, num_mtp_modules=1)))
    wanted = model(token_ids()).logits
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.model.layers[0].connections.parameters())
    assert torch.equal(model(token_ids()).logits, wanted)
