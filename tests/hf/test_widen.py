"""vwn.widen: trained weights kept, function preserved, live gradients, clear refusals."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo
from conftest import perturb
from runs import run_vwn
from vwn import UserError, VirtualWidthConfig, VirtualWidthForCausalLM, widen


def ids_of(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 3), (4, 16)])
def test_every_width_keeps_every_bit(m, n):
    model = zoo.tiny_causal_lm("qwen3_moe")
    with torch.no_grad():
        before = model(ids_of()).logits
        assert torch.equal(widen(model, m=m, n=n)(ids_of()).logits, before)
        assert torch.equal(widen(model, m=m, n=n, embedding="direct")(ids_of()).logits, before)
        assert torch.equal(model(ids_of()).logits, before)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_the_reduce_may_have_a_norm(model_type):
    """A scaled vector has the same RMSNorm and LayerNorm, up to rounding and the norm's eps."""
    model = zoo.tiny_causal_lm(model_type)
    with torch.no_grad():
        for parameter in model.get_input_embeddings().parameters():
            parameter.mul_(20)  # away from eps
        wide = widen(model, m=2, n=4, reduce_norm="rms_norm", check=False)
        torch.testing.assert_close(wide(ids_of()).logits, model(ids_of()).logits, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="integer r"):
        widen(model, m=2, n=3, reduce_norm="rms_norm")


def test_the_new_weights_learn():
    """Routing weights of the further slots have gradients at once, and some steps change what the slots do."""
    wide = widen(zoo.tiny_causal_lm("gpt2"), m=2, n=4).train()
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        loss = wide(ids_of(), labels=ids_of()).loss
        loss.backward()
        if step == 0:
            for layer in wide.model.layers:
                for connection in layer.connections:
                    assert connection.dynamic_alpha.grad.abs().max() > 0
                    assert connection.bias_alpha.grad[2:, :2].abs().max() > 0  # the read of the further slots
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert wide.model.layers[0].connections[0].bias_alpha[2:, :2].abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding", ["replicated", "direct"])
def test_tables_tied_and_not(tied, embedding, tmp_path):
    model = zoo.tiny_causal_lm("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = model(ids_of()).logits
    wide = widen(model, m=2, n=4, embedding=embedding)
    table = wide.model.embed_tokens.table.weight
    assert table.shape == (zoo.VOCAB, zoo.HIDDEN * (2 if embedding == "direct" else 1))
    assert (table is wide.lm_head.weight) == (tied and embedding == "replicated")
    assert wide.config.tie_word_embeddings == (tied and embedding == "replicated")
    wide.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids_of()).logits, before)
    assert (loaded.model.embed_tokens.table.weight is loaded.lm_head.weight) == (tied and embedding == "replicated")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma3_text", "bloom", "falcon_h1", "mamba", "deepseek_v3"])
def test_saved_and_loaded_and_built_anew(model_type, tmp_path):
    """The config says all that the loader has to know; every weight perturbed, so that nothing is at its start."""
    wide = perturb(widen(zoo.tiny_causal_lm(model_type), m=2, n=3)).eval()
    wide.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=wide.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(loaded(ids_of()).logits, wide(ids_of()).logits)
        fresh = VirtualWidthForCausalLM(
            VirtualWidthConfig(backbone=zoo.tiny_config(model_type), m=2, n=3, tie_word_embeddings=False)
        ).eval()
        assert fresh(ids_of()).logits.isfinite().all()
    greedy = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(ids_of(), **greedy), wide.generate(ids_of(), **greedy))
    assert torch.equal(wide.generate(ids_of(), **greedy), wide.generate(ids_of(), use_cache=False, **greedy))


def test_a_table_that_scales_its_rows_does_so_from_a_config_too():
    config = zoo.tiny_config("gemma3_text")
    model = VirtualWidthForCausalLM(VirtualWidthConfig(backbone=config, m=2, n=4, tie_word_embeddings=False))
    rows = model.model.embed_tokens(ids_of())
    table = model.model.embed_tokens.table.weight[ids_of()]
    torch.testing.assert_close(rows, table * config.hidden_size**0.5, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = zoo.tiny_causal_lm("llama").to(dtype)
    wide = widen(model, m=2, n=4)
    assert wide.dtype == dtype
    assert {p.dtype for n, p in wide.named_parameters() if "connections" in n} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(wide(ids_of()).logits, model(ids_of()).logits)


def test_what_is_shared_and_what_stays():
    model = zoo.tiny_causal_lm("qwen3").train()
    model.generation_config.max_new_tokens = 3
    kept, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    wide = widen(model, m=2, n=4)
    assert wide.training
    assert wide.generation_config.max_new_tokens == 3
    assert wide.model.layers[0].self_attn.q_proj.weight is model.model.layers[0].self_attn.q_proj.weight
    assert [type(m) for m in model.modules()] == classes
    assert not any(p.is_meta for p in (*wide.parameters(), *wide.buffers()))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(wide.eval()(ids_of()).logits, kept.eval()(ids_of()).logits)


def test_with_multi_token_prediction():
    model = zoo.tiny_causal_lm("qwen3_moe")
    wide = widen(model, m=2, n=4, num_mtp_modules=2)
    with torch.no_grad():
        assert torch.equal(wide(ids_of()).logits, model(ids_of()).logits)
    out = wide(ids_of(), labels=ids_of())
    assert len(out.losses) == 3
    assert all(loss.isfinite() for loss in out.losses)
    out.loss.backward()
    assert all(p.grad is not None for p in wide.model.mtp.parameters() if p.requires_grad)


def test_relatives_can_be_had_as_well():
    model = zoo.tiny_causal_lm("llama")
    wide = widen(model, m=1, n=2, carry_constraint="doubly_stochastic", check=False)
    with torch.no_grad():
        torch.testing.assert_close(wide(ids_of()).logits, model(ids_of()).logits, rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="starts near the identity"):  # mHC does not start as the plain stream
        widen(model, m=1, n=4, connection="mhc")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: widen(widen(zoo.tiny_causal_lm("llama"), m=1, n=2), m=1, n=2), "virtual width already"),
        (lambda: widen(zoo.tiny_causal_lm("llama").model, m=1, n=2), "with its head.*LlamaModel"),
        (lambda: widen(torch.nn.Linear(2, 2), m=1, n=2), "got Linear"),
        (lambda: widen(zoo.tiny_causal_lm("deepseek_v4"), m=1, n=2), "widened already"),
        (lambda: widen(zoo.tiny_causal_lm("openai-gpt"), m=1, n=2), "not its residual stream"),
        (lambda: widen(zoo.tiny_causal_lm("llama"), m=5, n=10), "5"),
        (lambda: widen(zoo.tiny_causal_lm("llama"), m=4, n=2), "n"),
        (lambda: widen(zoo.tiny_causal_lm("llama"), m=1, n=2, embedding="factorised"), "factorised"),
        (lambda: widen(zoo.tiny_causal_lm("llama"), m=1, n=2, dinamic=False), "no option 'dinamic'"),
        (lambda: widen(zoo.tiny_causal_lm("llama"), m=1, n=2, frozen=True), "no option 'frozen'"),
        (lambda: widen(zoo.tiny_causal_lm("llama").to("meta"), m=1, n=2), "meta device"),
        (lambda: widen(zoo.tiny_causal_lm("inkling_text"), m=1, n=2, embedding="direct"), "more than look up rows"),
        (lambda: widen(zoo.tiny_causal_lm("glm_moe_dsa"), m=1, n=2, num_mtp_modules=1), "cannot have MTP modules"),
        (lambda: VirtualWidthForCausalLM(VirtualWidthConfig(backbone=zoo.tiny_config("hy_v4"), m=1, n=2)), "already"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_model_spread_by_accelerate_is_refused(tmp_path):
    """Where layers have hooks, and where single weights are on disk; but not for hooks that leave them alone."""
    dispatch, ids = pytest.importorskip("accelerate").dispatch_model, torch.arange(3, 10)[None]

    def spread(**places: str):
        model = zoo.tiny_causal_lm("llama")
        wanted = model(ids).logits
        parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        place = {f"model.layers.{i}.{part}": "cpu" for i in range(zoo.LAYERS) for part in parts}
        place |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        place |= {name.replace("__", "."): where for name, where in places.items()}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return dispatch(model, place, main_device="cpu", offload_dir=folder, force_hooks=True), wanted

    model, wanted = spread()
    assert torch.equal(widen(model, m=2, n=3)(ids).logits, wanted)
    for name in ("lm_head", "model__layers__1__mlp", "model__layers__1__input_layernorm"):
        weight = f"{name.replace('__', '.')}."
        with pytest.raises(UserError, match=rf"offloaded \({weight}.* is one\).*load it without offloading"):
            widen(spread(**{name: "disk"})[0], m=2, n=3)
    whole = dispatch(zoo.tiny_causal_lm("llama"), {"": "cpu"}, force_hooks=True)
    with pytest.raises(UserError, match="widen the model before that"):
        widen(whole, m=2, n=3)


def test_a_norm_of_the_embedding_gives_copies_of_a_segment_the_same_numbers():
    wide = widen(zoo.tiny_causal_lm("bloom"), m=2, n=3)
    state = wide(torch.arange(3, 10)[None], output_hidden_states=True).over_width_hidden_states[0]
    first, _, copy = state.chunk(3, dim=-1)
    torch.testing.assert_close(copy, first)


def test_a_model_that_does_more_than_it_shows_is_refused(monkeypatch):
    """What the probe is for: the head of this model scales its logits, and no table says so."""
    from vwn.hf import families

    monkeypatch.setitem(families.FAMILIES, "granite", families.Family())
    with pytest.raises(UserError, match="changed the logits"):
        widen(zoo.tiny_causal_lm("granite"), m=1, n=2)
    broken = zoo.tiny_causal_lm("llama")
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="changed the logits by up to nan"):
        widen(broken, m=1, n=2)


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    def run(*arguments: object) -> tuple[int, str, str]:
        return run_vwn(capsys, monkeypatch, "widen", *arguments)

    model = zoo.tiny_causal_lm("gpt2")
    model.save_pretrained(tmp_path / "plain")
    code, out, _ = run(tmp_path / "plain", tmp_path / "wide", "--m", 2, "--n", 4)
    assert code == 0
    assert "gpt2, m = 2, n = 4" in out
    assert json.loads((tmp_path / "wide/config.json").read_text())["backbone"]["model_type"] == "gpt2"
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
        assert torch.equal(loaded(ids_of()).logits, model(ids_of()).logits)
    for arguments, message in (
        ((tmp_path / "plain", tmp_path / "wide"), "not empty"),
        ((tmp_path / "none", tmp_path / "new"), "none"),
        ((tmp_path / "wide", tmp_path / "new"), "virtual width already"),
        ((tmp_path / "plain", tmp_path / "new", "--m", 3, "--n", 6), "3"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert message in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model_type", ["mamba", "bloom"])
def test_backbones_that_hand_their_layers_the_state_alone(model_type):
    """Every sublayer can be looked into all the same; dropped states cannot be rebuilt."""
    from vwn.hf.measures import record, sublayer_names

    wide, seen = widen(zoo.tiny_causal_lm(model_type), m=2, n=4), []
    record(wide, ids_of(), lambda i, *_: seen.append(i))
    assert seen == [*range(len(sublayer_names(wide)))]
    wide.train().model.keep_states_every = 2
    with pytest.raises(UserError, match=f"type {model_type} does not; set it to 1"):
        wide(ids_of(), labels=ids_of())


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next"])
def test_the_stream_reaches_the_layers_of_others(model_type):
    """Rebuilt states give the same gradients, and every sublayer can be looked into."""
    from vwn.hf.measures import record, sublayer_names

    wide = perturb(widen(zoo.tiny_causal_lm(model_type), m=2, n=4), scale=0.05).train()
    seen = []
    record(wide.eval(), ids_of(), lambda i, *_: seen.append(i))
    assert seen == list(range(len(sublayer_names(wide))))
    gradients = []
    for every in (1, 3):
        wide.train().model.keep_states_every = every
        wide.zero_grad()
        wide(ids_of(), labels=ids_of()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in wide.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_config_of_several_modalities_is_refused():
    from transformers import Gemma3Config

    with pytest.raises(ValueError, match=r"gemma3 takes more than text.*gemma3_text"):
        VirtualWidthConfig(backbone=Gemma3Config(), m=2, n=4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mamba", "longcat_flash", "gemma3_text"])
def test_in_bfloat16_and_back(model_type, tmp_path):
    """Sums in another order round otherwise, some weights stay in float32, and some types keep the state in it."""
    zoo.tiny_causal_lm(model_type).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    wide = widen(model.eval(), m=2, n=4)
    assert wide.dtype == torch.bfloat16
    wide.save_pretrained(tmp_path / "wide")
    attention = wide.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", attn_implementation=attention)
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_of()).logits, wide(ids_of()).logits, rtol=0, atol=0)


def test_a_checkpoint_that_is_not_whole_is_not_widened(tmp_path):
    from safetensors.torch import load_file, save_file

    from vwn.hf import widen_checkpoint

    zoo.tiny_causal_lm("llama").save_pretrained(tmp_path / "plain")
    path = tmp_path / "plain/model.safetensors"
    weights = load_file(path)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight is one"):
        widen_checkpoint(str(tmp_path / "plain"), tmp_path / "wide", m=2, n=4)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        widen_checkpoint(str(tmp_path / "plain"), tmp_path / "wide", m=2, n=4)
    assert not (tmp_path / "wide").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom"])
def test_an_mtp_module_is_one_layer_without_a_front(model_type):
    config = VirtualWidthConfig(
        backbone=zoo.tiny_config(model_type), m=2, n=4, num_mtp_modules=1, tie_word_embeddings=False
    )
    names = [name for name, _ in VirtualWidthForCausalLM(config).model.mtp.named_parameters()]
    assert not any("wpe" in name or "embed_positions" in name or "word_embeddings" in name for name in names)


def test_where_the_rotary_embedding_changes_for_long_texts():
    """Phi-3 computes its cache anew at that length; transformers 5.17 does not feed the whole text then."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 10}
    rope |= {"partial_rotary_factor": 1.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    lengths = {"original_max_position_embeddings": 10, "max_position_embeddings": 64}
    model = zoo.tiny_causal_lm("phi3", rope_parameters=rope, **lengths)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    out = widen(model, m=2, n=3).generate(ids_of(1, 7), **options)
    uncached = [model(out.sequences[:, :length]).logits[:, -1] for length in range(7, 17)]
    torch.testing.assert_close(torch.cat(out.logits), torch.cat(uncached), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_rotary_embeddings_that_look_at_the_positions(rope):
    config = zoo.tiny_config("llama")
    config.max_position_embeddings, config.rope_parameters = 8, {"rope_theta": 1e4, **rope}
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = ids_of(length=40)  # longer than what widen checks: a dynamic embedding keeps the scale of the longest
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(widen(model, m=2, n=3)(ids).logits, plain)
