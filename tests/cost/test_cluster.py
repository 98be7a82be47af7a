"""``vwn cost --cluster``: bytes against models that were built and run, traffic against what engines really send."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from counted import backbone
from runs import run_vwn
from vwn.common.errors import UserError
from vwn.cost.cluster.hardware import Cluster, Gpu, parse_cluster
from vwn.cost.cluster.layout import Layout, layouts, make_layout
from vwn.cost.cluster.memory import memory, saved_per_token
from vwn.cost.cluster.options import PlanOptions
from vwn.cost.cluster.plan import make_plan, plans
from vwn.cost.cluster.shape import ModelShape, model_shape
from vwn.cost.cluster.table import plan_rows, plan_text
from vwn.cost.cluster.timing import step_time, traffic
from vwn.hf import VirtualWidthConfig
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.training.presets import PRESETS

WINDOW = 64
ONE = Cluster("one", Gpu(80, 100, 1000, 100, 10), per_node=1, nodes=1)
EIGHT = Cluster("eight", Gpu(80, 100, 1000, 100, 10), per_node=4, nodes=2, latency_us=0)


def config(m: int | None = 4, n: int = 16, kind: str = "llama", mtp: int = 0, **fields: Any) -> Any:
    sizes = {key: fields.pop(key) for key in list(fields) if hasattr(backbone(kind), key)}
    if m is None:
        return backbone(kind, **sizes)
    return VirtualWidthConfig(backbone=backbone(kind, **sizes), m=m, n=n, num_mtp_modules=mtp, **fields)


def options(**changes: Any) -> PlanOptions:
    return replace(PlanOptions(batch_tokens=1024 * WINDOW), **changes)


@pytest.mark.parametrize(
    "made",
    [
        config(None),
        config(None, tie_word_embeddings=True),
        config(kind="qwen3_moe", mtp=1),
        config(kind="mixtral", embedding="factorised", mtp=2),
        config(embedding="replicated", reduce="sum", ngram_order=3, ngram_buckets=50),
    ],
    ids=["plain", "tied", "moe with mtp", "factorised", "replicated"],
)
def test_state_on_a_gpu_is_the_models_tensors(made: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    numbers = sum(p.numel() for p in model.parameters())
    shape = model_shape(made, WINDOW)
    assert shape.parameters == numbers
    needed = memory(shape, Layout(1, 4, 2, 1, 1), options())
    assert needed.parameters == needed.gradients == numbers * 4 / 4
    assert needed.optimizer == numbers * 8 / 4
    # what is split over two ranks is matrices and tables; connections and norms are on both
    halves = memory(shape, Layout(2, 1, 1, 1, 1), options()).parameters / 4
    whole = sum(
        p.numel()
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p.ndim == 1 or "Connection" in type(module).__name__ or "Router" in type(module).__name__
        or type(module).__name__ in ("OverWidthReduce", "OverWidthEmbedding", "BlockLinear")
    )  # fmt: skip
    assert halves == (numbers - whole) / 2 + whole


@pytest.mark.parametrize("pp", [2, 3])
def test_stages_hold_the_model_once_and_tied_tables_twice(pp: int) -> None:
    from vwn.cost.cluster.memory import stage_weights

    for tied in (False, True):
        shape = model_shape(config(None, tie_word_embeddings=tied), WINDOW)
        stages = [stage_weights(shape, Layout(1, 1, 1, pp, 4), s) for s in range(pp)]
        total = sum(w.split + w.whole for groups in stages for w in groups)
        assert total == shape.parameters + (320 * 128 if tied else 0)


def saved_bytes(made: Any, depth: int) -> int:
    """Of a real forward: what is kept for the backward, parameters aside, each storage once."""
    made.get_text_config().num_hidden_layers = depth
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    ids = torch.randint(1, 320, (2, WINDOW))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mock.patch.object(LlamaRMSNorm, "forward", _norm):
        loss = model(ids, labels=ids, use_cache=False).loss
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values())


class _FusedNorm(torch.autograd.Function):
    """Saves what a fused norm saves, its input; PyTorch's own on a CPU keeps the normalised one as well."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x, x.shape[-1:], weight)


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _FusedNorm.apply(x, self.weight)


@pytest.mark.parametrize("shape", [None, (2, 3), (4, 16)])
def test_a_layer_saves_what_the_formula_says(shape: tuple[int, int] | None) -> None:
    made = config(*(shape or (None,)), num_key_value_heads=4)
    measured = (saved_bytes(made, 6) - saved_bytes(made, 2)) / 4 / (2 * WINDOW)
    model = model_shape(made, WINDOW)
    formula = saved_per_token(model, model.layers[0], options(precision="float32", checkpointing="none"), 1)
    small = 4 * 4  # attention's log-sums
    assert measured == pytest.approx(formula + small, rel=0.005)
    if shape:  # and the connections' part is the kernels' own bound
        plain = model_shape(config(None, num_key_value_heads=4), WINDOW)
        bare = saved_per_token(plain, plain.layers[0], options(precision="float32", checkpointing="none"), 1)
        assert formula - bare == 2 * (model.ratio + 1) * 128 * 4


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_fsdp_sends_what_the_plan_says() -> None:
    """The bytes that FSDP2 hands to its collectives, on a process group that moves nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    made, seen = config(2, 3, reduce_norm="none"), dict.fromkeys(("all_gather", "reduce_scatter"), 0)

    def counted(name: str) -> Any:
        calls = [f"{name}_single", f"{name}_into_tensor", f"{name}_tensor"]  # newer PyTorch first
        call = next(c for c in calls if hasattr(dist, c))
        real = getattr(dist, call)

        def count(*args: Any, **kwargs: Any) -> Any:
            seen[name] += max(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            return real(*args, **kwargs)

        return mock.patch.object(dist, call, count)

    model: Any = AutoModelForCausalLM.from_config(made)
    with fake_ranks(4):
        mesh = init_device_mesh("cpu", (4,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in (model.model.embed_tokens, *model.model.layers, [model.lm_head, model.model.norm,
                                                                     model.model.reduce], model):  # fmt: skip
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        ids = torch.randint(1, 320, (1, 8))
        with counted("all_gather"), counted("reduce_scatter"):
            model(ids, use_cache=False).logits.float().sum().backward()
    shape = model_shape(made, WINDOW)
    planned = traffic(shape, Layout(1, 4, 1, 1, 1), options()).fsdp
    # rows are padded to the group's size, which the plan leaves out
    assert seen["all_gather"] == pytest.approx(2 * 2 * shape.parameters, rel=0.01)
    assert seen["reduce_scatter"] == pytest.approx(4 * shape.parameters, rel=0.01)
    assert planned.data == (2 * 2 + 4) * shape.parameters
    assert planned.sent == planned.data * 3 / 4


class Collectives(TorchDispatchMode):
    """Adds up the larger side of every collective."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if any(name in str(func) for name in ("all_gather_into_tensor", "reduce_scatter_tensor")):
            self.bytes += max(args[0].nbytes, out.nbytes)
        return out


def test_tensor_parallelism_sends_the_backbones_width_however_wide_the_state() -> None:
    """A sublayer between sequence shards, in PyTorch's own tensor parallelism: four times ``D`` per token."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )  # fmt: skip

    width, tokens = 16, 8
    block = nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))
    with fake_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(block, mesh, {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            "0": ColwiseParallel(),
            "2": RowwiseParallel(output_layouts=Shard(1)),
        })  # fmt: skip
        assert isinstance(block[0].weight, DTensor)
        x = torch.randn(1, tokens // 2, width, requires_grad=True)
        with Collectives() as seen:
            block(x).sum().backward()
    assert seen.bytes == 4 * width * tokens * 4
    shape = model_shape(config(4, 16), WINDOW)
    layout = Layout(2, 1, 1, 1, 1)
    planned = traffic(shape, layout, options(precision="float32", checkpointing="none")).tp
    per_token = planned.data / WINDOW / 4 / 128
    assert per_token == 3 * 2 * 4 + 2 * shape.ratio + 2  # three layers of two sublayers, the table, the head


@pytest.mark.parametrize(("m", "n", "sublayers"), [(2, 3, 1), (2, 3, 2), (2, 8, 3), (2, 8, 4), (2, 8, 7), (1, 3, 2)])
def test_no_fewer_numbers_say_what_a_state_is(m: int, n: int, sublayers: int) -> None:
    """The state is linear in the outputs before it; the rank of that map is what a boundary cannot do without."""
    torch.manual_seed(0)
    width = 4 * m
    chain = [GeneralizedHyperConnection(width, m, n, dynamic=False).double() for _ in range(sublayers)]
    with torch.no_grad():
        for p in (p for c in chain for p in c.parameters()):
            p.add_(0.3 * torch.randn_like(p))

    def state(outputs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(1, n * 4, dtype=torch.float64)
        for connection, z in zip(chain, outputs, strict=True):
            h = connection.write(h, z[None])
        return h[0]

    jacobian = torch.autograd.functional.jacobian(state, torch.zeros(sublayers, width, dtype=torch.float64))
    rank = torch.linalg.matrix_rank(jacobian.flatten(1)).item()
    assert rank == min(n / m, sublayers) * width


def test_a_step_by_hand() -> None:
    """One GPU of 100 TFLOP/s and 1000 GB/s, nothing to send: computing, connections by bytes, AdamW."""
    made = config(2, 3)
    shape, o = model_shape(made, WINDOW), options(efficiency=0.5, bandwidth_share=0.5, checkpointing="none")
    layout = Layout(1, 1, 1, 1, 1024)
    t = step_time(shape, layout, ONE, o, traffic(shape, layout, o))
    tokens = 1024 * WINDOW
    connections = 3 * shape.cost.flops.connections  # forward and backward
    assert t.compute == pytest.approx(tokens * (3 * shape.cost.flops.total - connections) / 50e12)
    per_layer = (5 * 1.5 + 4 + 7 * 1.5 + 6) * 128 * 2
    assert t.connections == pytest.approx(tokens * 3 * per_layer / 500e9)
    assert t.optimizer == pytest.approx(shape.parameters * (3 * 4 + 2 * 8) / 500e9)
    assert t.step == t.compute + t.connections + t.optimizer
    many = step_time(shape, replace(layout, pp=3), replace(EIGHT, per_node=3), o, traffic(shape, layout, o))
    assert many.bubble == pytest.approx(2 / 1024 * (many.compute + many.connections))


def test_messages_by_hand() -> None:
    # eight ranks in two nodes of four: each of 7/8 of the data inside at 100 GB/s; half of it in over four ports
    assert EIGHT.seconds(8e9, 8, 1, 1.0, 0) == pytest.approx(max(7 / 100, 4 / 40))
    assert EIGHT.seconds(8e9, 4, 1, 1.0, 0) == pytest.approx(6 / 100)
    assert EIGHT.seconds(8e9, 2, 4, 1.0, 0) == pytest.approx(4 / 10)
    assert replace(EIGHT, latency_us=1).seconds(0, 8, 1, 1.0, 10) == pytest.approx(70e-6)
    assert EIGHT.seconds(8e9, 1, 1, 1.0, 5) == 0


def shapes() -> list[ModelShape]:
    return [model_shape(config(*mn), WINDOW) for mn in [(None,), (2, 3), (4, 16), (8, 64)]]


def test_what_grows_with_what() -> None:
    eight, o = Layout(1, 8, 1, 1, 2), options()
    wide = shapes()
    for narrower, wider in itertools.pairwise(wide):
        for quantity in (lambda s: memory(s, eight, o).total, lambda s: traffic(s, eight, o).fsdp.sent,
                         lambda s: traffic(s, Layout(1, 4, 1, 2, 2), o).boundary,
                         lambda s: step_time(s, eight, EIGHT, o, traffic(s, eight, o)).step):  # fmt: skip
            assert quantity(narrower) < quantity(wider)
    model = wide[2]
    by_checkpointing = [memory(model, eight, options(checkpointing=c)).activations for c in ("none", "selective")]
    assert by_checkpointing == sorted(by_checkpointing, reverse=True)
    deep = model_shape(config(4, 16, num_hidden_layers=24), WINDOW)
    saved = [memory(deep, eight, options(checkpointing=c, batch_tokens=WINDOW)).activations
             for c in ("none", "selective", "full")]  # fmt: skip
    assert saved == sorted(saved, reverse=True)
    kept = [saved_per_token(model, model.layers[0], options(keep_states_every=k), 1) for k in (1, 2, 4)]
    assert kept == sorted(kept, reverse=True)
    by_tp = [memory(model, Layout(tp, 1, 1, 1, 1), o).total for tp in (1, 2)]
    assert by_tp[0] > by_tp[1]
    assert traffic(model, Layout(2, 2, 1, 2, 2), o).boundary == traffic(model, Layout(1, 4, 1, 2, 2), o).boundary / 2
    logits = model_shape(config(None, vocab_size=32_000), WINDOW)
    unfused, fused = (memory(logits, Layout(1, 1, 1, 1, 1), options(fused_loss=x)) for x in (False, True))
    assert unfused.moment == "loss"
    assert unfused.logits == WINDOW * 32_000 * (2 + 4 + 4)
    assert unfused.total > fused.total


def test_the_fastest_that_fits_and_advice_where_nothing_does() -> None:
    made = {"plain": config(None), "wide": config(8, 64)}
    found = plans(made, EIGHT, options(show=3), WINDOW)
    assert [len(x) for x in found.values()] == [3, 3]
    for best in found.values():
        assert [p.time.step for p in best] == sorted(p.time.step for p in best)
        assert all(p.fits and not p.advice for p in best)
    shape = model_shape(made["wide"], WINDOW)
    layout = make_layout(shape, EIGHT, options(), 1, 8, 1)
    o = options(checkpointing="none", usable_memory=1.0, micro_batch=8)
    total = memory(shape, layout, o).total
    tight = replace(EIGHT, gpu=replace(EIGHT.gpu, memory_gb=0.9 * total / 1e9))
    plan = make_plan(shape, tight, o, layout)
    assert not plan.fits
    assert "most for activations" in plan.advice
    assert "--checkpointing full" in plan.advice
    tiny = replace(EIGHT, gpu=replace(EIGHT.gpu, memory_gb=1e-4))
    nothing = plans({"wide": made["wide"]}, tiny, o, WINDOW)["wide"]
    assert len(nothing) == 1
    assert "lower it by" in nothing[0].advice


def test_rows_and_text() -> None:
    arms = {"plain": config(None), "a long name of an arm": config(4, 16)}
    found = plans(arms, EIGHT, options(pp=2, fsdp=4, tp=1), WINDOW)
    rows = json.loads(json.dumps(plan_rows(found)))
    assert [row["name"] for row in rows] == ["plain", "a long name of an arm"]
    assert rows[1]["sent"]["boundary"] == 4 * rows[0]["sent"]["boundary"] == WINDOW * 4 * 128 * 2
    assert rows[0]["time"]["step"] == pytest.approx(sum(v for k, v in rows[0]["time"].items() if k != "step"))
    text = plan_text(found)
    assert max(map(len, text.splitlines())) <= 110
    assert "not a measurement" in text


BAD = {
    "h100": "KIND:GPUSxNODES",
    "h100:0x4": "KIND:GPUSxNODES",
    "k80:8x2": "'k80' is not in the table (a100, h100",
    "nowhere.json": "cannot read the cluster",
    "cluster.yaml": "or a .json file",
    '{"per_node": 8, "nodes": 2, "gpu": "h100", "memory": 3}': "'memory'",
    '{"per_node": 8, "nodes": 2.5, "gpu": "h100"}': "nodes of the cluster",
    '{"per_node": 8, "nodes": 2}': "memory_gb",
    '{"per_node": 8, "nodes": 2, "gpu": "h100", "tflops": -1}': "tflops of the cluster",
    '{"per_node": 8, "nodes": 2, "gpu": "h100", "tflops": "9"}': "tflops of the cluster",
    '{"per_node": 8, "nodes": 2, "gpu": "k80"}': "'k80' is not in the table",
    "[1]": "cannot read the cluster",
    "{": "cannot read the cluster",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_clusters_that_are_none(text: str, message: str, tmp_path: Any) -> None:
    if text[0] in "{[":
        (tmp_path / "c.json").write_text(text)
        text = str(tmp_path / "c.json")
    with pytest.raises(UserError) as refused:
        parse_cluster(text)
    assert message in str(refused.value)


def test_a_cluster_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"gpu": "h100", "per_node": 4, "nodes": 3, "inter_gb_s": 25}')
    cluster = parse_cluster(str(path))
    assert cluster == replace(parse_cluster("h100:4x3"), gpu=replace(parse_cluster("h100:4x3").gpu, inter_gb_s=25))
    own = {"per_node": 1, "nodes": 1, "memory_gb": 8, "tflops": 0.1, "hbm_gb_s": 13, "intra_gb_s": 1, "inter_gb_s": 1}
    (tmp_path / "cpu.json").write_text(json.dumps(own))
    assert parse_cluster(str(tmp_path / "cpu.json")).name == "cpu"


def test_models_that_cannot_be_planned_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be planned"):
        model_shape(GPT2Config(n_layer=2, n_embd=64, n_head=2), WINDOW)


@pytest.mark.parametrize(
    ("changes", "made", "message"),
    [
        ({"tp": 3}, config(None), "--tp 3 does not divide the 2 key-value heads"),
        ({"pp": 4}, config(None), "--pp 4 is more than the model's 3 layers"),
        ({"pp": 2}, config(4, 8, mtp=1), "does not go with MTP modules"),
        ({"fsdp": 3}, config(None), "does not divide the 8 GPUs"),
        ({"batch_tokens": 1000}, config(None), "is no multiple of the"),
        ({"efficiency": 0}, config(None), "--efficiency must be above 0"),
        ({"overlap": float("nan")}, config(None), "--overlap must be between"),
        ({"checkpointing": "full", "keep_states_every": 2}, config(None), "both rebuild the states"),
    ],
    ids=lambda x: str(x)[:20] if isinstance(x, dict) else "",
)
def test_layouts_that_do_not_go(changes: dict[str, Any], made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plans({"arm": made}, EIGHT, options(**changes), WINDOW)


def test_every_layout_uses_every_gpu() -> None:
    shape = SimpleNamespace(heads=(4, 4), window=WINDOW, layers=(0,) * 8, mtp=())
    found = layouts(shape, EIGHT, options())  # type: ignore[arg-type]
    assert len(found) > 10
    assert len(set(found)) == len(found)
    for x in found:
        assert x.tp * x.fsdp * x.replicas * x.pp == 8
        assert x.micro_batches * x.fsdp * x.replicas * WINDOW == options().batch_tokens


def test_on_the_command_line(monkeypatch: Any, capsys: Any) -> None:
    small = ["cost", "--backbone", "nano", "--window", "64", "--arms", "plain", "4x8", "--batch-tokens", "65536"]
    code, out, _ = run_vwn(capsys, monkeypatch, *small, "--cluster", "h100:8x2", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["plain", "4x8"]
    code, out, _ = run_vwn(capsys, monkeypatch, *small, "--cluster", "h200:8x2", "--no-fused-loss")
    assert code == 0
    assert "16 GPUs h200" in out
    for arguments, message in ((small, "--batch-tokens plans a training run; name the machines with --cluster"),
                               ([*small, "--cluster", "x:1x1"], "'x' is not in the table")):  # fmt: skip
        code, _, err = run_vwn(capsys, monkeypatch, *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def test_the_page_says_how_far_the_prediction_is_from_the_measured_step() -> None:
    """One thread of a CPU; its FLOP/s are what the plain model's step says."""
    root = Path(__file__).parents[2]
    measured, copies = (
        json.loads((root / "benchmarks" / "results" / f"{name}-cpu.json").read_text())["rows"]
        for name in ("training_step", "connections")
    )
    bandwidth = statistics.median(row["gb_per_s"] for row in copies if row["pass"] == "copy")
    rows = [r for r in measured if (r["family"], r["threads"], r["variant"]) == ("dense", 1, "auto")]
    fields = {k: v for k, v in PRESETS["tiny"].fields(2048, 256).items() if k != "model_type"}
    o = options(
        batch_tokens=2048, micro_batch=8, precision="float32", checkpointing="none", fused_loss=False,
        efficiency=1.0, bandwidth_share=1.0,
    )  # fmt: skip

    def planned(tflops: float, **width: Any) -> Any:
        made = VirtualWidthConfig(backbone=LlamaConfig(**fields), num_mtp_modules=1, **width)
        machine = Cluster("cpu", Gpu(16, tflops, bandwidth, 1, 1), 1, 1)
        return make_plan(model_shape(made, 256), machine, o, Layout(1, 1, 1, 1, 1))

    page = (root / "docs" / "scale.md").read_text()
    for row in rows:
        one = planned(1.0, connection="residual")
        peak = one.time.compute / (row["plain_median_ms"] / 1e3 - one.time.optimizer)
        m, n = row["connection"]
        plain, wide = planned(peak, connection="residual"), planned(peak, m=m, n=n)
        assert plain.time.step == pytest.approx(row["plain_median_ms"] / 1e3)
        saved = (wide.memory.activations + wide.memory.logits) / 1e6
        assert saved == pytest.approx(row["saved_mb"], rel=0.25)
        assert 1 < wide.time.step / plain.time.step < row["time_ratio"]
        line = (
            f"| `({m},{n})` | {wide.time.step / plain.time.step:.2f} | {row['time_ratio']:.2f} | {saved:.0f} | "
            f"{row['saved_mb']:.0f} |"
        )
        assert line in page, line
