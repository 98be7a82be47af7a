"""What serves a model asks of it: devices and offloading, export, caches, quantisation, and what vLLM builds on."""

from __future__ import annotations

import sys
import tomllib
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, StaticCache

from conftest import perturb
from tiny import build, token_ids, vwn_config
from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM
from vwn.nn.connection import Connection, has_hooks
from vwn.nn.generalized import GeneralizedHyperConnection
from vwn.nn.relatives import ManifoldHyperConnection
from vwn.vllm.plugin import prepare, register

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


# Precision


@pytest.mark.parametrize(
    ("connection", "dtype"), [("ghc", torch.float16), ("mhc", torch.bfloat16), ("frozen", torch.bfloat16)]
)
def test_from_config_keeps_the_routing_in_float32(connection, dtype):
    width = {"m": 1, "n": 2, "connection": "mhc"} if connection == "mhc" else {"frozen": connection == "frozen"}
    model = AutoModelForCausalLM.from_config(vwn_config("llama", **width, num_mtp_modules=1), dtype=dtype)
    routing = [m for m in model.modules() if isinstance(m, Connection)]
    assert len(routing) == 6
    for connection in routing:
        for name, value in connection.state_dict().items():
            assert value.dtype == torch.float32
            if isinstance(connection, ManifoldHyperConnection) and name.startswith("scale"):
                assert not torch.equal(value, value.to(dtype).float()), "0.01 went through the lower precision"
    assert {p.dtype for name, p in model.named_parameters() if ".connections." not in name} == {dtype}
    assert model.model.backbone.config.dtype == dtype
    assert torch.isfinite(model(token_ids()).logits).all()


# Devices


HERE = ("embed_tokens", "backbone.rotary_emb", "norm", "reduce", "mtp", "backbone.layers.0", "backbone.layers.1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, VirtualWidthForCausalLM]:
    path, model = tmp_path_factory.mktemp("model"), build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize(
    ("offloaded", "dtype"),
    [(["backbone.layers.1"], torch.bfloat16), ([n for n in HERE if "rot" not in n], torch.float32)],
)
def test_layers_that_are_offloaded(checkpoint, tmp_path, offloaded, dtype):
    """Their connections read and write outside any `forward`, where offloading would bring the weights in."""
    path, model = checkpoint
    places = {f"model.{name}": "disk" if name in offloaded else "cpu" for name in HERE}
    again = AutoModelForCausalLM.from_pretrained(
        path,
        device_map=places | {"lm_head": "cpu", "unembed_expand": "cpu"},
        offload_folder=tmp_path / "off",
        dtype=dtype,
    )
    layer = again.get_submodule(f"model.{offloaded[0] if 'layers' in offloaded[0] else 'backbone.layers.1'}")
    assert layer.self_attn.q_proj.weight.is_meta
    assert {p.dtype for p in layer.connections.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in layer.connections.parameters())
    assert hasattr(layer.mlp, "_hf_hook")
    assert not any(has_hooks(c, c.read, c.write) for c in layer.connections), "none of the fused passes would run"
    whole = model if dtype == torch.float32 else AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    for _ in range(2):
        assert torch.equal(again(token_ids()).logits, whole(token_ids()).logits)
    assert torch.equal(again.generate(token_ids(), **GREEDY), whole.generate(token_ids(), **GREEDY))
    assert layer.self_attn.q_proj.weight.is_meta
    if dtype == torch.float32:
        with pytest.warns(UserWarning, match="offloaded"):
            again.save_pretrained(tmp_path / "again")
        stored = load_file(tmp_path / "again" / "model.safetensors")
        assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_accelerates_own_offloading_brings_the_weights_of_connections_in():
    model = build(vwn_config("llama", 2, 4, num_mtp_modules=1))
    wanted = model(token_ids()).logits
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.model.layers[0].connections.parameters())
    assert torch.equal(model(token_ids()).logits, wanted)


# Export, compiled decoding, vocabulary


@pytest.mark.slow
def test_export():
    model = build(vwn_config("mixtral", 2, 3))
    model.set_experts_implementation("batched_mm")
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    exported = torch.export.export(
        model, (token_ids(),), {"use_cache": False}, strict=False, dynamic_shapes=shapes
    ).module()
    for ids in (token_ids(), token_ids(2, 17)):
        torch.testing.assert_close(exported(ids, use_cache=False).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_static_cache_decodes_as_one_graph():
    model = build(vwn_config("llama", 2, 4)).double()  # a padded cache sums in another order
    ids = token_ids(2, 9)
    wanted = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = [model(ids[:, :4], past_key_values=cache, use_cache=True).logits]
        for t in range(4, 9):
            position = torch.full((2, 1), t)
            out = step(ids[:, t : t + 1], past_key_values=cache, position_ids=position, use_cache=True)
            actual.append(out.logits)
    torch.testing.assert_close(torch.cat(actual, dim=1), wanted, rtol=1e-6, atol=1e-6)
    assert torch.compiler.is_compiling() is False


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embedding": "factorised", "tie_word_embeddings": True, "num_mtp_modules": 1},
        {"m": 1, "n": 1, "connection": "residual", "table_factor": 2},
    ],
)
def test_resizing_the_vocabulary(tmp_path, fields):
    model = build(vwn_config("llama", **{"m": 2, "n": 4} | fields))
    ids = token_ids().clamp(max=49)
    before, tied = model(ids).logits, model.config.tie_word_embeddings
    width = model.get_input_embeddings().weight.shape[1]
    for size in (70, 50):
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().weight.shape == (size, width)
        assert model.config.vocab_size == model.config.backbone.vocab_size == size
        after = model(ids, labels=ids)
        common = min(size, 61)
        assert torch.equal(after.logits[..., :common], before[..., :common])
        assert after.logits.shape[-1] == size
        assert torch.isfinite(after.loss)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, after.logits)


# Quantisation


def test_nothing_that_widens_is_a_linear_layer():
    """Quantisers and vLLM replace every `nn.Linear`: those are the backbone's, which are in MTP layers too."""
    for fields in ({"num_mtp_modules": 1}, {"embedding": "factorised"}, {"m": 1, "n": 2, "connection": "hc"}):
        model = build(vwn_config("llama", **{"m": 2, "n": 4} | fields))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                assert ".self_attn." in name or ".mlp." in name or name == "lm_head", name


@pytest.mark.slow
def test_quantised_weights_are_the_backbones(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = build(vwn_config("llama", 2, 4, sizes, num_mtp_modules=1))
    model.save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True)
    options = {"quantization_config": quantisation, "device_map": "cpu", "dtype": torch.float32}
    small, full = AutoModelForCausalLM.from_pretrained(tmp_path, **options), model.state_dict()
    for name, value in small.named_parameters():
        if "_proj" not in name:
            assert torch.equal(value, full[name]), name
        else:
            assert value.dtype in (torch.int8, torch.uint8), name
    difference = (small(token_ids()).logits - model(token_ids()).logits).abs().max()
    assert 0 < difference < 0.9 * model(token_ids()).logits.abs().max()


# What vLLM's transformers backend takes for granted. vLLM itself is not installed here.


def test_the_entry_point_is_there_and_runs_without_vllm():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["vllm.general_plugins"]["vwn"].partition(":")
    assert getattr(import_module(module), name) is register
    assert "vllm" not in sys.modules
    register()
    register()


def test_with_vllm_the_model_is_registered_by_name(monkeypatch):
    registered = {}
    fake = types.ModuleType("vllm")
    fake.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    register()
    assert registered == {"VirtualWidthForCausalLM": "vwn.vllm.model:VirtualWidthForCausalLM"}
    assert build(vwn_config()).__class__.__name__ in registered
    assert (Path(import_module("vwn").__file__).parent / "vllm" / "model.py").exists()


class Recorder:
    """Stands where vLLM's attention does: one call per layer, found by its index."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        assert attention_mask is None
        self.calls.append(module.layer_idx)
        assert attention_instances[module.layer_idx] == f"instance {module.layer_idx}"
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None


@pytest.fixture
def recorder() -> Any:
    recorder = Recorder()
    AttentionInterface.register("vllm", recorder)
    yield recorder
    AttentionInterface._global_mapping.pop("vllm")


def as_vllm_builds(config: Any, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The base model on its own, the table replaced by one of the width that the backbone's config tells, loaded."""
    config.get_text_config()._attn_implementation = "vllm"
    base = AutoModel.from_config(config, dtype=torch.float32)
    text = config.get_text_config()
    width = getattr(text, "embedding_size", None) or text.hidden_size
    base.set_input_embeddings(nn.Embedding(text.vocab_size, width))
    own = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    missing, unexpected = base.load_state_dict({k: v for k, v in own.items() if not k.startswith("mtp.")}, strict=False)
    assert not missing
    assert not unexpected
    return base.eval()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"num_mtp_modules": 2}),
        ("qwen3", {"embedding": "factorised", "tie_word_embeddings": True}),
        ("mixtral", {"m": 4, "n": 4}),
    ],
)
def test_the_base_model_is_what_vllm_runs(recorder, kind, fields):
    changes = {"tie_word_embeddings": not fields.get("tie_word_embeddings", False)}  # the backbone's own is not ours
    fields = {"m": 2, "n": 4, "tie_word_embeddings": False} | fields
    model = build(vwn_config(kind, **fields, backbone=changes))
    ids = token_ids(1, 7)
    wanted = model(ids).logits[0]
    config = type(model.config)(**model.config.to_dict())
    prepare(config)
    base = as_vllm_builds(config, dict(model.state_dict()))
    assert base.get_decoder() is base
    assert base.base_model_prefix == "model"
    assert not base.supports_pp_plan
    layers = config.get_text_config().num_hidden_layers
    instances = {i: f"instance {i}" for i in range(layers)}
    ways = {"input_ids": ids, "inputs_embeds": base.embed_tokens(ids)}
    for name, value in ways.items():
        recorder.calls.clear()
        inputs = {"input_ids": None, "inputs_embeds": None} | {name: value}
        position_ids = torch.arange(7)[None]
        options = {"use_cache": False, "attention_instances": instances, "return_dict": False}
        outputs = base(**inputs, position_ids=position_ids, **options)
        assert isinstance(outputs, tuple)
        hidden = outputs[0][0]
        assert hidden.shape == (7, 24)
        assert recorder.calls == list(range(layers)), "one call per layer, each with its own index"
        head = (
            base.get_input_embeddings().weight if config.get_text_config().tie_word_embeddings else model.lm_head.weight
        )
        torch.testing.assert_close(hidden @ head.T, wanted, rtol=1e-4, atol=1e-4)
    assert config.get_text_config().tie_word_embeddings == fields["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("fields", "stages", "said"),
    [
        ({"ngram_order": 2, "ngram_buckets": 5}, 1, "ngram_order = 2"),
        ({"m": 1, "n": 1, "connection": "residual", "table_factor": 2}, 1, "table_factor = 2"),
        ({"frozen": True}, 1, "frozen = True"),
        ({}, 2, "2 pipeline stages"),
    ],
)
def test_what_vllm_cannot_run_is_refused(fields, stages, said):
    with pytest.raises(UserError, match=f"{said}.*vLLM does not have"):
        prepare(vwn_config("llama", **fields), stages)


def test_our_vllm_model_prepares_and_keeps_the_routing_in_float32(monkeypatch):
    """Against a stand-in for vLLM's class that does what that does with parameters."""

    class Transformers(nn.Module):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()
            self.skip_prefixes = []
            with torch.device("meta"):
                self.model = AutoModel.from_config(vllm_config.model_config.hf_config, dtype=torch.bfloat16)
            self.init_parameters(self.model)

        def init_parameters(self, module, dtype=None):
            for child in module.modules():
                for name, parameter in child.named_parameters(recurse=False):
                    if parameter.is_meta:
                        data = torch.zeros(parameter.shape, dtype=dtype or torch.bfloat16)
                        setattr(child, name, nn.Parameter(data))

    names = ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.transformers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].TransformersForCausalLM = Transformers
    monkeypatch.delitem(sys.modules, "vwn.vllm.model", raising=False)
    config = vwn_config("llama", 2, 4, num_mtp_modules=1)
    settings = types.SimpleNamespace(
        model_config=types.SimpleNamespace(hf_config=config),
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=1),
    )
    served = import_module("vwn.vllm.model").VirtualWidthForCausalLM(vllm_config=settings)
    monkeypatch.delitem(sys.modules, "vwn.vllm.model")
    assert "model.mtp." in served.skip_prefixes
    for name, parameter in served.named_parameters():
        assert parameter.dtype == (torch.float32 if ".connections." in name else torch.bfloat16), name
    assert any(isinstance(m, GeneralizedHyperConnection) for m in served.modules())
    perturb(served)
    assert served.embed_input_ids(token_ids()).shape == (2, 9, 48)
