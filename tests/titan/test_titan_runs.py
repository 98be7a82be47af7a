"""Virtual width in torchtitan, as runs of its own command on CPU processes (with the shim in titan_train.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed: vwn[titan]")
pytestmark = pytest.mark.slow

from transformers import AutoModelForCausalLM  # noqa: E402

import vwn  # noqa: E402
import vwn.hf  # noqa: E402
from processes import free_port  # noqa: E402
from vwn.titan.export import export  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"


@cache
def server():
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(SUPPORT / "titan_train.py")]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Run:
    """Runs of torchtitan in a folder; what they log, per step."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.dump = folder / name

    def __call__(self, *arguments, processes=1, environment=(), killed=False):
        shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | dict(environment)
        command = ["--module", "titan_configs", *arguments, "--dump_folder", str(self.dump)]
        asked = []
        for rank in range(processes):
            own = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            asked.append([own, str(self.folder / f"{self.name}.{rank}.log"), str(self.record(rank)), command])
        print(json.dumps(asked), file=server().stdin, flush=True)
        codes = json.loads(server().stdout.readline())
        log = (self.folder / f"{self.name}.0.log").read_text()
        assert codes == [-signal.SIGKILL if killed else 0] * processes, log[-3000:]
        return self.steps(processes - 1)

    def record(self, rank):
        return self.folder / f"{self.name}.{rank}.jsonl"

    def steps(self, rank=0):
        return {x["step"]: (x["loss"], x["grad_norm"]) for x in map(json.loads, self.record(rank).open())}

    def layout(self, rank=0):
        return json.loads(self.record(rank).with_suffix(".layout").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("titan")


@pytest.fixture(scope="module")
def one(folder):
    """The run that the others are to equal: one process, with an MTP module, leaving checkpoints."""
    run = Run(folder, "one")
    run("--config", "tiny_mtp", "--checkpoint.enable")
    return run


def assert_same(given, expected, tolerance=1e-5):
    assert given.keys() == expected.keys()
    for step, values in expected.items():
        assert given[step] == pytest.approx(values, rel=tolerance), step


def test_fsdp2_equals_one_process_and_a_killed_run_resumes(folder, one):
    run = Run(folder, "fsdp")
    options = ("--config", "tiny_mtp", "--training.local_batch_size", "2", "--checkpoint.enable")
    run(*options, processes=2, environment={"TITAN_KILL_AT": 3}, killed=True)
    for name, (kind, mesh, placements, _) in run.layout()["weights"].items():
        assert (kind, mesh, placements) == ("DTensor", ["fsdp"], ["S(0)"]), name
    assert run.layout()["weights"]["tok_embeddings.table.weight"][3] == [31, 36]
    run.record(0).unlink()
    assert sorted(p.name for p in (run.dump / "checkpoint").iterdir()) == ["step-2"]
    after = run(*options, processes=2)
    assert sorted(run.steps(0)) == [3, 4]
    assert_same(after, one.steps())


def test_tensor_parallelism_shards_and_equals_one_process(folder, one):
    run = Run(folder, "tp")
    assert_same(run("--config", "tiny_mtp", "--parallelism.tensor_parallel_degree", "2", processes=2), one.steps())
    layout = run.layout(1)
    assert "DTensor" not in {kind for kind, *_ in layout["states"]}
    assert {tuple(shape) for _, *shape in layout["states"]} == {(4, 8, 36)}  # half the sequence
    for name, (kind, mesh, placements, _) in layout["weights"].items():
        assert (kind, mesh) == ("DTensor", ["fsdp", "tp"]), name
        small = any(x in name for x in ("connections", "norm", "reduce", "fuse"))
        assert (placements[1] == "R") == small, (name, placements)
    assert layout["weights"]["layers.0.attention.wo.weight"][3] == [24, 12]
    assert layout["weights"]["lm_head.weight"][3] == [30, 24]


@pytest.fixture(scope="module")
def experts(folder):
    """What one process logs for a model with experts."""
    return Run(folder, "experts")("--config", "tiny_experts")


def test_pipeline_equals_one_process(folder, experts):
    run = Run(folder, "pp")
    options = ("--parallelism.pipeline_parallel_degree", "2")
    assert_same(run("--config", "tiny_experts", *options, processes=2), experts)
    first, last = (set(run.layout(rank)["weights"]) for rank in (0, 1))
    assert "tok_embeddings.table.weight" in first - last
    assert {"norm.reduce.weight", "norm.norm.weight", "lm_head.weight"} <= last - first
    assert {state[-1] for state in run.layout(1)["states"]} == {36}  # the stage is handed the over-width state


def test_expert_parallelism_equals_one_process(folder, experts):
    run = Run(folder, "ep")
    options = ("--training.local_batch_size", "2", "--parallelism.expert_parallel_degree", "2")
    assert_same(run("--config", "tiny_experts", *options, processes=2), experts)
    kind, mesh, _, shape = run.layout()["weights"]["layers.0.moe.routed_experts.inner_experts.w1_EFD"]
    assert kind == "DTensor"
    assert "ep" in mesh
    assert shape == [2, 40, 24]


def test_sixteen_ranks_dry_run(folder):
    run = Run(folder, "dry")
    degrees = ("--parallelism.tensor_parallel_degree", "2", "--parallelism.data_parallel_shard_degree", "8")
    assert len(run("--config", "tiny_mtp", "--comm.mode", "fake_backend", *degrees, environment={"NGPU": 16})) == 4
    _, mesh, _, shape = run.layout()["weights"]["layers.0.feed_forward.w1.weight"]
    assert mesh == ["fsdp", "tp"]
    assert shape == [3, 24]  # 40 rows over two, then over eight


def test_export_to_transformers_and_back(folder, one):
    out = folder / "exported"
    export(one.dump / "checkpoint" / "step-4", out)
    with pytest.raises(vwn.UserError, match="exists already"):
        export(one.dump / "checkpoint" / "step-4", out)
    model = AutoModelForCausalLM.from_pretrained(out).train()
    model.loss_backend = "torch"
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    rows = torch.stack([torch.randint(0, 61, (17,), generator=generator) for generator in generators])
    loss = model(rows, labels=rows, num_items_in_batch=64).loss.item()

    load = ("--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(out))
    back = Run(folder, "back")("--config", "tiny_mtp", "--training.steps", "1", *load)
    assert back[1][0] == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(one.steps()[1][0], rel=1e-3)
