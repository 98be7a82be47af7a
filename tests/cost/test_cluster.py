"""``vwn cost --cluster``: memory against models that were built and run."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from counted import backbone
from runs import run_vwn
from vwn.common.errors import UserError
from vwn.cost.cluster.memory import ParallelLayout, memory, saved_per_token
from vwn.cost.cluster.options import Cluster, PlanOptions, parse_cluster
from vwn.cost.cluster.plan import plan_rows, plan_text, plans
from vwn.cost.cluster.shape import model_shape
from vwn.hf import VirtualWidthConfig
from vwn.training.presets import PRESETS

WINDOW = 64
EIGHT = Cluster("eight", 80, per_node=4, nodes=2)


def config(m: int | None = 4, n: int = 16, kind: str = "llama", mtp: int = 0, **fields: Any) -> Any:
    sizes = {key: fields.pop(key) for key in list(fields) if hasattr(backbone(kind), key)}
    if m is None:
        return backbone(kind, **sizes)
    return VirtualWidthConfig(backbone=backbone(kind, **sizes), m=m, n=n, num_mtp_modules=mtp, **fields)


def options(**changes: Any) -> PlanOptions:
    return replace(PlanOptions(), **changes)


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
    assert memory(shape, ParallelLayout(1, 4, 2), options()).state == numbers * (4 + 4 + 8) / 4
    assert memory(shape, ParallelLayout(1, 4, 2), options(precision="bfloat16")).state == numbers * (2 + 2 + 8) / 4
    # what is split over two ranks is matrices and tables; connections and norms are on both
    halves = memory(shape, ParallelLayout(2, 1, 1), options()).state / 16
    whole = sum(
        p.numel()
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p.ndim == 1 or "Connection" in type(module).__name__ or "Router" in type(module).__name__
        or type(module).__name__ in ("OverWidthReduce", "OverWidthEmbedding", "BlockLinear")
    )  # fmt: skip
    assert halves == (numbers - whole) / 2 + whole


def saved_bytes(made: Any, depth: int) -> int:
    """Bytes that a real forward keeps for the backward, parameters aside, each storage once."""
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


def test_what_grows_with_what() -> None:
    eight, o = ParallelLayout(1, 8, 1), options()
    wide = [model_shape(config(*mn), WINDOW) for mn in [(None,), (2, 3), (4, 16), (8, 64)]]
    for narrower, wider in itertools.pairwise(wide):
        assert memory(narrower, eight, o).total < memory(wider, eight, o).total
    deep = model_shape(config(4, 16, num_hidden_layers=24), WINDOW)
    saved = [memory(deep, eight, options(checkpointing=c)).activations for c in ("none", "selective", "full")]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == 3
    model = wide[2]
    kept = [saved_per_token(model, model.layers[0], options(keep_states_every=k), 1) for k in (1, 2, 4)]
    assert kept[0] > kept[1] > kept[2]
    assert memory(model, ParallelLayout(1, 1, 1), o).total > memory(model, ParallelLayout(2, 1, 1), o).total
    logits = model_shape(config(None, vocab_size=32_000), WINDOW)
    unfused, fused = (memory(logits, ParallelLayout(1, 1, 1), options(fused_loss=x)) for x in (False, True))
    assert unfused.logits == WINDOW * 32_000 * (2 + 4 + 4)
    assert unfused.total > fused.total


def test_advice_where_a_model_does_not_fit() -> None:
    made, o = {"wide": config(8, 64)}, options(checkpointing="none", micro_batch=8)
    plan = plans(made, EIGHT, o, WINDOW)["wide"]
    assert plan.fits
    assert not plan.advice
    plan = plans(made, replace(EIGHT, memory_gb=0.9 * plan.memory.total / 1e9), o, WINDOW)["wide"]
    assert not plan.fits
    assert "most for activations" in plan.advice
    assert "--checkpointing full" in plan.advice
    assert "NO" in plan_text({"wide": plan})


def test_rows_and_text() -> None:
    arms = {"plain": config(None), "a long name of an arm": config(4, 16)}
    found = plans(arms, EIGHT, options(fsdp=4, tp=2), WINDOW)
    rows = json.loads(json.dumps(plan_rows(found)))
    assert [row["name"] for row in rows] == ["plain", "a long name of an arm"]
    assert rows[0]["layout"] == {"tp": 2, "fsdp": 4, "replicas": 1}
    assert rows[1]["memory"]["total"] == sum(
        rows[1]["memory"][k] for k in ("state", "buffers", "activations", "logits")
    )
    assert plans(arms, EIGHT, options(tp=2), WINDOW)["plain"].layout == ParallelLayout(2, 4, 1)
    assert max(map(len, plan_text(found).splitlines())) <= 110


@pytest.mark.parametrize(
    ("text", "message"),
    [("h100", "KIND:GPUSxNODES"), ("h100:0x4", "KIND:GPUSxNODES"), ("k80:8x2", r"'k80' is not known \(a100, h100"),
     ("mine.json", "KIND:GPUSxNODES"), ("0gb:1x1", "'0gb' is not known")],
)  # fmt: skip
def test_clusters_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_cluster(text)


def test_clusters_by_their_word() -> None:
    assert parse_cluster("h200:4x3") == Cluster("h200", 141, 4, 3)
    assert parse_cluster("24gb:2x1") == Cluster("24gb", 24, 2, 1)


def test_models_that_cannot_be_planned_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be planned"):
        model_shape(GPT2Config(n_layer=2, n_embd=64, n_head=2), WINDOW)


@pytest.mark.parametrize(
    ("changes", "made", "message"),
    [
        ({"tp": 3}, config(None), "--tp 3 does not divide the 2 key-value heads"),
        ({"tp": 2, "fsdp": 3}, config(None), "--tp 2 × --fsdp 3 = 6 does not divide the 8 GPUs"),
        ({"tp": 8}, config(None, num_key_value_heads=8, num_attention_heads=8), "does not divide the 4 GPUs of a node"),
        ({"micro_batch": 0}, config(None), "--micro-batch must be at least 1, got 0"),
        ({"checkpointing": "full", "keep_states_every": 2}, config(None), "both rebuild the states"),
    ],
    ids=lambda x: str(x)[:20] if isinstance(x, dict) else "",
)
def test_layouts_that_do_not_go(changes: dict[str, Any], made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plans({"arm": made}, EIGHT, options(**changes), WINDOW)


def test_on_the_command_line(monkeypatch: Any, capsys: Any) -> None:
    small = ["cost", "--backbone", "nano", "--window", "64", "--arms", "plain", "4x8", "--micro-batch", "2"]
    code, out, _ = run_vwn(capsys, monkeypatch, *small, "--cluster", "h100:8x2", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == ["plain", "4x8"]
    code, out, _ = run_vwn(capsys, monkeypatch, *small, "--cluster", "h200:8x2", "--no-fused-loss")
    assert code == 0
    assert "16 GPUs h200" in out
    for arguments, message in ((small, "--micro-batch plans a training run; name the machines with --cluster"),
                               ([*small, "--cluster", "x:1x1"], "'x' is not known")):  # fmt: skip
        code, _, err = run_vwn(capsys, monkeypatch, *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def test_the_page_says_how_far_the_prediction_is_from_the_measured_memory() -> None:
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks" / "results" / "training_step-cpu.json").read_text())["rows"]
    rows = [r for r in measured if (r["family"], r["threads"], r["variant"]) == ("dense", 1, "auto")]
    fields = {k: v for k, v in PRESETS["tiny"].fields(2048, 256).items() if k != "model_type"}
    o = options(micro_batch=8, precision="float32", checkpointing="none", fused_loss=False)
    page = (root / "docs" / "scale.md").read_text()
    assert len(rows) == 3
    for row in rows:
        m, n = row["connection"]
        made = VirtualWidthConfig(backbone=LlamaConfig(**fields), num_mtp_modules=1, m=m, n=n)
        needed = memory(model_shape(made, 256), ParallelLayout(1, 1, 1), o)
        saved = (needed.activations + needed.logits) / 1e6
        assert saved == pytest.approx(row["saved_mb"], rel=0.25)
        line = f"| `({m},{n})` | {saved:.0f} | {row['saved_mb']:.0f} |"
        assert line in page, line
