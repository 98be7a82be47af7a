"""FSDP2 with connections as units of their own: float32 routing in a bfloat16 model, the gradients of one process."""

from __future__ import annotations

import pytest
import torch

from processes import Processes

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def sharded_equals_whole(folder, every_connection):
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from vwn.hf import VirtualWidthForCausalLM

    dist.init_process_group("gloo")
    whole, model = (VirtualWidthForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    for layer in model.model.layers:
        for unit in layer.connections if every_connection else [layer.connections]:
            fully_shard(unit)
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    rank = dist.get_rank()
    for _ in range(2):
        model.zero_grad()
        whole.zero_grad()
        model(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss.backward()
        (sum(whole(row[None], labels=row[None]).loss for row in IDS) / 2).backward()
        wanted = {name: p.grad.float() for name, p in whole.named_parameters()}
        for name, p in model.named_parameters():
            assert p.dtype is (torch.float32 if ".connections." in name else torch.bfloat16), name
            got = p.grad.full_tensor().float()
            assert (got - wanted[name]).norm() < 1e-2 * wanted[name].norm(), name
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("every_connection", [False, True], ids=["layer", "connection"])
def test_a_bfloat16_model_shards_with_its_routing_in_float32(tmp_path, every_connection):
    from tiny import build, vwn_config

    build(vwn_config()).save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", every_connection)
    with Processes(sharded_equals_whole, *arguments, shim=False, log=tmp_path / "log") as processes:
        assert processes.wait() == [0, 0], processes.said()
