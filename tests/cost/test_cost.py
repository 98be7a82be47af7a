"""``vwn cost`` against PyTorch's own FLOP counter and against models that were built and run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, PreTrainedConfig, T5Config

from counted import BACKBONES, BATCH, LENGTH, backbone, build_counted, counted_flops_per_token
from vwn.common.errors import UserError
from vwn.cost import connection_cost, cost_table, model_cost
from vwn.hf import VirtualWidthConfig
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.geometry import Geometry
from zoo import tiny_config

WIDTHS = [(1, 1), (1, 4), (2, 2), (2, 3), (4, 16), (8, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("kind", BACKBONES)
def test_flops_of_widened_models_are_those_the_counter_sees(kind: str, mtp: int) -> None:
    for m, n in [(2, 2), (2, 3), (8, 64)]:  # the other widths are those of the connection alone, below
        config = VirtualWidthConfig(backbone=backbone(kind), m=m, n=n, num_mtp_modules=mtp)
        cost, model = model_cost(config, sequence_length=LENGTH), build_counted(config)
        assert cost.forward_flops_per_token == counted_flops_per_token(model), (m, n)
        assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"m": 4, "n": 8, "embedding": "factorised"},
        {"m": 4, "n": 8, "embedding": "replicated", "reduce": "sum", "tie_word_embeddings": True},
        {"m": 4, "n": 8, "dynamic": False, "carry_constraint": "identity"},
        {"m": 2, "n": 3, "num_mtp_modules": 2},
        {"connection": "residual"},
        {"connection": "residual", "num_mtp_modules": 1, "tie_word_embeddings": True},
        dict(connection="residual", table_factor=4, tie_word_embeddings=True, ngram_order=2, ngram_buckets=9),
    ],
    ids=str,
)
def test_flops_and_parameters_of_every_form(fields: dict[str, Any]) -> None:
    config = VirtualWidthConfig(backbone=backbone("mixtral"), **fields)
    model = build_counted(config)
    cost = model_cost(config, sequence_length=LENGTH)
    assert cost.forward_flops_per_token == counted_flops_per_token(model)
    assert cost.parameters == sum(p.numel() for p in model.parameters())


def test_a_table_factor_costs_a_linear_at_both_ends() -> None:
    config = VirtualWidthConfig(backbone=backbone(), connection="residual", table_factor=4, num_mtp_modules=1)
    flops = model_cost(config, sequence_length=LENGTH).flops
    assert (flops.embedding, flops.unembedding) == (2 * 128 * 512, 2 * 2 * (128 * 512 + 512 * 320))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_cost_the_same_however_they_are_run(kind: str) -> None:
    config = backbone(kind)
    cost = model_cost(config, sequence_length=LENGTH)
    assert cost.forward_flops_per_token == counted_flops_per_token(build_counted(config, experts="batched_mm"))


def test_training_flops_are_what_forward_and_backward_take() -> None:
    config = VirtualWidthConfig(backbone=backbone(), m=2, n=3, num_mtp_modules=1)
    model = build_counted(config)
    ids = torch.randint(1, 320, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / (BATCH * LENGTH)
    assert model_cost(config, sequence_length=LENGTH).training_flops_per_token == pytest.approx(counted, rel=0.02)


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet() -> None:
    dense = model_cost(backbone("llama"), sequence_length=8)
    assert dense.active_parameters == dense.parameters
    assert (dense.connection, dense.flops.connections) == (None, 0)
    cost = model_cost(backbone("mixtral"), sequence_length=8)
    assert cost.parameters - cost.active_parameters == 3 * (8 - 2) * (3 * 128 * 352)


def test_the_published_size_of_mixtral_8x7b() -> None:
    cost = model_cost(MixtralConfig(), sequence_length=4096)
    assert cost.parameters == 46_702_792_704
    assert cost.active_parameters / 1e9 == pytest.approx(12.9, abs=0.05)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("m", "n"), WIDTHS)
def test_connection_flops_are_those_the_counter_sees(m: int, n: int, dynamic: bool) -> None:
    for constraint in ("none", "identity"):
        ghc = GeneralizedHyperConnection(64, m, n, dynamic, constraint)
        state = torch.randn(BATCH, LENGTH, ghc.geometry.over_width)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ghc(state, lambda x: x)
        cost = connection_cost(ghc.geometry, dynamic=dynamic, learned_carry=ghc.learned_carry)
        assert cost.matmul_flops == counter.get_total_flops() / (BATCH * LENGTH)
        assert cost.flops - cost.matmul_flops == (4 * ghc.geometry.over_width if dynamic else 0)


def test_the_papers_own_figures_at_2_3() -> None:
    width = 1024
    cost = connection_cost(Geometry(width, 2, 3))
    parts = (cost.norm_flops, cost.dynamic_parameter_flops, cost.width_connection_flops, cost.depth_connection_flops)
    assert parts == (6 * width, 21 * width, 15 * width, 6 * width)
    assert cost.flops == 48 * width
    assert cost.activation_bytes == 3 * width
    assert cost.activation_overhead == pytest.approx(0.088, abs=5e-4)


@pytest.mark.parametrize(("m", "n"), WIDTHS)
def test_least_bytes_moved(m: int, n: int) -> None:
    g = Geometry(256, m, n)
    cost, r, unit = connection_cost(g, bytes_per_element=4), g.ratio, 256 * 4
    assert cost.forward_bytes == (2 * r + 2) * unit
    assert cost.backward_bytes == (3 * r + 3) * unit


def _table(**widths: tuple[int, int]) -> tuple[list[dict[str, Any]], str]:
    configs = {"plain": VirtualWidthConfig(backbone=backbone(), connection="residual", num_mtp_modules=1)}
    for name, (m, n) in widths.items():
        configs[name] = VirtualWidthConfig(backbone=backbone(), m=m, n=n, num_mtp_modules=1)
    return cost_table(configs, LENGTH)


def test_rows_say_what_the_models_cost() -> None:
    rows, _ = _table(small=(2, 3), large=(8, 64))
    assert [row["name"] for row in rows] == ["plain", "small", "large"]
    plain, small, large = json.loads(json.dumps(rows))
    assert plain["flops_ratio"] == 1
    assert plain["connection_share"] == 0
    assert plain["traffic_bytes"] is None
    assert plain["activation_bytes_per_layer"] == 34 * 128
    cost = model_cost(VirtualWidthConfig(backbone=backbone(), m=2, n=3, num_mtp_modules=1), sequence_length=LENGTH)
    assert (small["m"], small["n"], small["r"]) == (2, 3, 1.5)
    assert small["params"] == cost.parameters
    assert small["flops_per_token"] == sum(small["flops"].values()) == cost.forward_flops_per_token
    assert small["flops_ratio"] == small["flops_per_token"] / plain["flops_per_token"]
    assert small["connection_flops_per_sublayer"] == 48 * 128
    assert small["connection_share"] == 4 * 2 * 42 * 128 / small["flops_per_token"]
    assert small["activation_bytes_per_layer"] == 37 * 128
    assert large["traffic_bytes"] == {"forward": 18 * 128 * 2, "backward": 27 * 128 * 2}


def test_the_ratio_needs_a_plain_model_to_compare_with() -> None:
    rows, text = cost_table({"2x3": VirtualWidthConfig(backbone=backbone(), m=2, n=3)}, LENGTH)
    assert rows[0]["flops_ratio"] is None
    assert "–" in text


def test_the_text_fits_a_terminal_and_has_a_line_for_each_model() -> None:
    _, text = _table(**{"2x3": (2, 3), "a_name_that_is_much_longer_than_the_column_it_goes_into": (8, 64)})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert sum(line.startswith("2x3 ") for line in lines) == 1
    assert sum(line.startswith("a_name") for line in lines) == 1
    assert "4.736 kB (+8.8%)" in text
    assert "11.52 kB" in text


def test_the_config_is_left_as_it_was() -> None:
    config = VirtualWidthConfig(backbone=backbone(), m=2, n=3)
    before = config.to_dict()
    model_cost(config, sequence_length=8)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [(T5Config(), "no causal language model for T5Config"), (tiny_config("dbrx"), "forward pass needs values")],
    ids=["not causal", "loop over the experts hit"],
)
def test_what_cannot_be_costed_is_refused(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_cost(config, sequence_length=8)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "gemma3_text", "mamba", "falcon_h1", "deepseek_v3", "gpt_oss"])
def test_types_of_every_build(kind: str) -> None:
    """Other names, fused projections, low-rank attention, state spaces, experts with biases."""
    config, length = tiny_config(kind), 12
    cost = model_cost(config, sequence_length=length)
    model = build_counted(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(3, 90, (1, length)), use_cache=False)
    assert cost.forward_flops_per_token == counter.get_total_flops() // length
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert (cost.active_parameters < cost.parameters) == (kind in ("deepseek_v3", "gpt_oss"))


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="sequence_length must be 1 or more, got 0"):
        model_cost(backbone(), sequence_length=0)


def test_importing_the_formulas_needs_torch_only() -> None:
    code = "import sys; from vwn.cost import connection_cost; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
