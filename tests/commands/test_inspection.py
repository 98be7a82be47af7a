"""Looking inside: the terms of eq. 17, what is measured of them, and the files that are written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiny import build, stock, token_ids, vwn_config
from vwn.cli import main
from vwn.commands.inspection.config import InspectConfig
from vwn.commands.inspection.run import inspect_checkpoint, measure
from vwn.common.errors import UserError
from vwn.hf import VirtualWidthForCausalLM
from vwn.hf.measures import record, spectral_radius, static_routing, tanh_scales
from vwn.nn.connection import Routing

WIDTHS = [(1, 1), (2, 3), (3, 3), (4, 10), (1, 3)]
KINDS = {
    "ghc": {},
    "static": {"dynamic": False},
    "identity": {"carry_constraint": "identity"},
    "doubly stochastic": {"carry_constraint": "doubly_stochastic"},
    "hc": {"connection": "hc"},
    "mhc": {"connection": "mhc", "m": 1, "n": 3},
}


def model_of(kind="ghc", m=2, n=3, layers=2, **fields) -> VirtualWidthForCausalLM:
    fields = {"m": m, "n": n} | KINDS[kind] | fields
    return build(vwn_config(backbone={"num_hidden_layers": layers}, **fields)).double()


def seen(model, ids) -> tuple[list[tuple[Tensor, Tensor, Routing]], Tensor]:
    """State, ``Z`` and routing of every sublayer, as slots and segments, and the final state."""
    g, steps = model.config.geometry, []

    def visit(index, state, z, connection):
        assert index == len(steps)
        slots, segments = state.unflatten(-1, (g.n, -1)), z.unflatten(-1, (g.m, -1))
        steps.append((slots, segments, connection.routing_matrices(state)))

    return steps, record(model, ids, visit).unflatten(-1, (g.n, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_outputs_are_those_of_a_forward_by_hand(kind: str) -> None:
    model, ids = model_of(kind, num_mtp_modules=1), token_ids()
    steps, final = seen(model, ids)
    position_ids = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        state = model.model.embed_tokens(ids)
        rotary = model.model.backbone.rotary_emb(state, position_ids)
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        expected = []
        for layer in model.model.backbone.layers:
            sublayers = (
                lambda x, layer=layer: layer.self_attn(
                    layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask
                )[0],
                lambda x, layer=layer: layer.mlp(layer.post_attention_layernorm(x)),
            )
            for connection, sublayer in zip(layer.connections, sublayers, strict=True):
                z = sublayer(connection.read(state))
                expected.append((state, z))
                state = connection.write(state, z)
        out = model.model(input_ids=ids, use_cache=False)
    assert len(steps) == len(expected) == 4
    for (slots, segments, _), (state, z) in zip(steps, expected, strict=True):
        assert_close(slots.flatten(-2), state)
        assert_close(segments.flatten(-2), z)
    assert_close(final.flatten(-2), out.over_width_state)  # the hook is gone, the model runs as before


@pytest.mark.parametrize(("m", "n"), WIDTHS)
def test_unrolled_sum_is_the_final_state(m: int, n: int) -> None:
    """Eq. 17 by brute force, and the error that an inspection itself reports."""
    model, ids = model_of(m=m, n=n, layers=3), token_ids()
    steps, final = seen(model, ids)
    total = torch.zeros_like(final)
    for t in range(len(steps) + 1):
        term = steps[0][0] if t == 0 else steps[t - 1][2].beta.mT @ steps[t - 1][1]
        for _, _, routing in steps[t:]:
            term = routing.alpha[..., m:].mT @ term
        total = total + term
    assert float((total - final).norm() / final.norm()) < 1e-10
    assert measure(model, ids)["depth"]["unrolled_error"] < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_sum_holds_for_every_kind_of_connection(kind: str) -> None:
    assert measure(model_of(kind), token_ids())["depth"]["unrolled_error"] < 1e-10


def test_experts_are_a_sublayer_like_any_other() -> None:
    result = measure(build(vwn_config("qwen3_moe")), token_ids())  # experts do not run in float64
    assert [s["name"] for s in result["sublayers"]] == ["attn 1", "mlp 1", "attn 2", "mlp 2"]
    assert result["depth"]["unrolled_error"] < 1e-5


@pytest.mark.parametrize(("m", "n"), [(2, 3), (1, 3), (3, 3)])
def test_depth_map_is_that_of_a_naive_loop(m: int, n: int) -> None:
    model, ids = model_of(m=m, n=n), token_ids(3, 7)
    steps, final = seen(model, ids)
    reads = [r.alpha[..., :m].flatten(0, 1).numpy() for _, _, r in steps] + [None]
    carries = [r.alpha[..., m:].flatten(0, 1).numpy() for _, _, r in steps]
    writes = [r.beta.flatten(0, 1).numpy() for _, _, r in steps]
    states = [s.flatten(0, 1).numpy() for s, _, _ in steps] + [final.flatten(0, 1).numpy()]
    outputs = [states[0]] + [z.flatten(0, 1).numpy() for _, z, _ in steps]
    tokens, readers = ids.numel(), len(steps) + 1
    gain, carried = np.zeros((readers, readers)), np.zeros((readers, readers))
    for reader in range(readers):
        read_square = 0.0
        for token in range(tokens):
            read = np.eye(n) if reads[reader] is None else reads[reader][token]
            read_square += ((read.T @ states[reader][token]) ** 2).mean()
            for source in range(reader + 1):
                product = np.eye(n)
                for between in range(source, reader):
                    product = product @ carries[between][token]
                written = np.eye(n) if source == 0 else writes[source - 1][token].T
                path = read.T @ product.T @ written
                gain[reader, source] += np.sqrt((path**2).sum() / path.shape[0]) / tokens
                carried[reader, source] += ((path @ outputs[source][token]) ** 2).mean()
        carried[reader] = np.sqrt(carried[reader] / read_square)
    for batch_bytes in (1, 1 << 28):  # window by window, and all at once
        depth = measure(model, ids, batch_bytes)["depth"]
        for reader in range(readers):
            assert_close(depth["gain"][reader], gain[reader, : reader + 1].tolist())
            assert_close(depth["carried"][reader], carried[reader, : reader + 1].tolist())


def test_a_bfloat16_model_is_measured_in_float32() -> None:
    wide, narrow = measure(build(vwn_config()), token_ids()), measure(build(vwn_config()).bfloat16(), token_ids())
    assert narrow["depth"]["unrolled_error"] < 0.02  # its states are rounded at every sublayer
    for key in ("gain", "carried"):
        assert_close(narrow["depth"][key][0], wide["depth"][key][0], rtol=0.02, atol=0)
    assert_close(narrow["sublayers"][0]["slots"], wide["sublayers"][0]["slots"], rtol=0.02, atol=0.01)


def test_residual_connection_gives_ones() -> None:
    result = measure(model_of(m=1, n=1, layers=3, dynamic=False, frozen=True), token_ids())
    assert result["depth"]["gain"] == [[1.0] * (reader + 1) for reader in range(7)]
    for sublayer in result["sublayers"]:
        assert sublayer["spectral_radius"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
        assert sublayer["routing"]["carry"] == {"static": 1.0, "dynamic": 0.0, "varying": 0.0, "saturated": None}


def test_untrained_model_reads_its_first_slots() -> None:
    result = measure(VirtualWidthForCausalLM(vwn_config(m=2, n=3)).eval(), token_ids())
    assert result["depth"]["gain"] == [[1.0] * (reader + 1) for reader in range(5)]
    assert result["sublayers"][0]["slots"]["read"] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("n", [1, 3, 16])
def test_spectral_radius_is_numpys(n: int) -> None:
    carry = torch.randn(5, n, n, dtype=torch.float64)
    expected = [np.abs(np.linalg.eigvals(matrix.numpy())).max() for matrix in carry]
    assert_close(spectral_radius(carry).tolist(), expected)
    assert_close(spectral_radius(carry[:1].expand(4, n, n)).tolist(), expected[:1] * 4)


def test_statistics_are_those_of_all_tokens_at_once() -> None:
    m, n = 2, 3
    model, ids = model_of(m=m, n=n), token_ids(3, 7)
    steps, final = seen(model, ids)
    result = measure(model, ids, batch_bytes=1)
    connections = [c for layer in model.model.backbone.layers for c in layer.connections]
    for sublayer, connection, (state, _, routing) in zip(result["sublayers"], connections, steps, strict=True):
        alpha, beta = routing.alpha.flatten(0, 1).detach(), routing.beta.flatten(0, 1).detach()
        slots = sublayer["slots"]
        assert_close(slots["read"], alpha[..., :m].square().sum(-1).sqrt().mean(0).tolist())
        assert_close(slots["written"], beta.square().sum(-2).sqrt().mean(0).tolist())
        assert_close(slots["kept"], [alpha[:, i, m + i].mean().item() for i in range(n)])
        assert_close(slots["rms"], state.detach().square().mean((0, 1, 3)).sqrt().tolist())
        radii = np.abs(np.linalg.eigvals(alpha[..., m:].numpy())).max(-1)
        low, high = np.quantile(radii, [0.05, 0.95])
        assert_close(sublayer["spectral_radius"], {"mean": radii.mean().item(), "low": low, "high": high})
        c = connection
        parts = {
            "read": (alpha[..., :m], c.bias_alpha[:, :m], c.scale_alpha[:, :m]),
            "carry": (alpha[..., m:], c.bias_alpha[:, m:], c.scale_alpha[:, m:]),
            "write": (beta, c.bias_beta, c.scale_beta),
        }
        for name, (whole, static, scale) in parts.items():
            dynamic = (whole - static).detach()
            assert_close(
                sublayer["routing"][name],
                {
                    "static": static.square().mean().sqrt().item(),
                    "dynamic": dynamic.square().mean().sqrt().item(),
                    "varying": (dynamic - dynamic.mean(0)).square().mean().sqrt().item(),
                    "saturated": ((dynamic / scale).abs() > 0.99).double().mean().item(),
                },
            )
    assert_close(result["final_slot_rms"], final.square().mean((0, 1, 3)).sqrt().tolist())


@torch.no_grad()
def test_saturation_is_counted() -> None:
    model = model_of()
    connection = model.model.backbone.layers[0].connections[0]
    connection.dynamic_alpha[:, 0] *= 1e6  # one of the two columns of the read
    shares = measure(model, token_ids())["sublayers"][0]["routing"]
    assert shares["read"]["saturated"] == pytest.approx(0.5, abs=0.05)
    assert shares["write"]["saturated"] < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_static_part_of_every_kind(kind: str) -> None:
    """It is the same for every state, and the routing without it is what varies with the state."""
    connection = model_of(kind).model.backbone.layers[0].connections[0]
    before = {name: value.clone() for name, value in connection.state_dict().items()}
    states = torch.randn(2, connection.geometry.over_width, dtype=torch.float64)
    one, other = static_routing(connection, states), static_routing(connection, states[1:])
    assert_close(one, other)
    assert_close(connection.state_dict(), before)
    whole = connection.routing_matrices(states)
    if kind == "static":
        assert_close(whole.alpha, one.alpha.expand_as(whole.alpha))
    else:
        assert float((whole.alpha[0] - whole.alpha[1]).detach().abs().max()) > 1e-3
    expected = {"ghc": 3, "static": 0, "identity": 2, "doubly stochastic": 2, "hc": 3, "mhc": 0}[kind]
    assert len(tanh_scales(connection)) == expected


def test_diverged_model_is_refused() -> None:
    model = model_of()
    with torch.no_grad():
        model.model.backbone.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match="diverged: at 'mlp 2'"):
        measure(model, token_ids())


@pytest.mark.parametrize(("name", "where"), [("bias_alpha", "mlp 2"), ("bias_beta", "mlp 2")])
def test_broken_routing_is_refused_before_it_reaches_the_eigenvalues(name, where) -> None:
    model = model_of()
    with torch.no_grad():
        getattr(model.model.backbone.layers[1].connections[1], name)[0, -1] = torch.nan
    with pytest.raises(UserError, match=f"diverged: at '{where}'"):
        measure(model, token_ids())


@pytest.fixture(scope="module")
def inspected(finished, tmp_path_factory):
    run, _ = finished
    out = tmp_path_factory.mktemp("inspection") / "out"
    return run, out, inspect_checkpoint(InspectConfig(str(run.out), out, tokens=100))


def test_files_of_a_run(inspected) -> None:
    run, out, result = inspected
    assert json.loads((out / "inspect.json").read_text()) == json.loads(json.dumps(result))
    assert (result["tokens"], result["window"]) == (96, 32)  # whole windows of the run's length
    assert run.corpus.data in result["data"]
    assert result["depth"]["unrolled_error"] < 1e-5
    names = ("depth", "spectrum", "slots", "routing")
    for name in names:
        assert "</svg>" in (out / f"{name}.svg").read_text()
    page = (out / "inspect.html").read_text()
    assert page.count("data:image/svg+xml") == len(names)
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
def test_other_text_and_a_checkpoint_of_the_run(inspected, tmp_path) -> None:
    run, _, _ = inspected
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    checkpoint = next(run.out.glob("checkpoint-*"))
    result = inspect_checkpoint(InspectConfig(str(checkpoint), tmp_path / "out", data=str(text)))
    assert (result["data"], result["tokens"]) == (str(text), len("a few words") + 1)  # and the end of the text


def test_what_cannot_be_looked_at_is_refused(inspected, tmp_path) -> None:
    run, out, _ = inspected
    plain, residual, bare = tmp_path / "plain", tmp_path / "residual", tmp_path / "bare"
    stock().save_pretrained(plain)
    build(vwn_config(m=1, n=1, connection="residual")).save_pretrained(residual)
    build(vwn_config()).save_pretrained(bare)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = {
        "out exists already": InspectConfig(str(run.out), out),
        "tokens must be at least 2, got 1": InspectConfig(str(run.out), tmp_path / "o", tokens=1),
        "no checkpoint at 'nowhere'": InspectConfig("nowhere", tmp_path / "o"),
        "holds no model": InspectConfig(str(tmp_path), tmp_path / "o"),
        r"plain model \(llama\)": InspectConfig(str(plain), tmp_path / "o"),
        r"plain model \(virtual_width\)": InspectConfig(str(residual), tmp_path / "o"),
        "give --data": InspectConfig(str(bare), tmp_path / "o"),
        "empty.txt": InspectConfig(str(run.out), tmp_path / "o", data=str(empty)),
        "does not exist": InspectConfig(str(run.out), tmp_path / "o", data=str(tmp_path / "none.txt")),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=message):
            inspect_checkpoint(config)
        assert not (tmp_path / "o").exists()


def test_command_line(inspected, tmp_path, monkeypatch, capsys) -> None:
    run, _, _ = inspected
    monkeypatch.setattr("sys.argv", ["vwn", "inspect", str(run.out), "--out", str(tmp_path / "o"), "--tokens", "64"])
    monkeypatch.setattr("vwn.cli.show_our_logs", lambda: None)  # its handler would outlive the test
    main()
    assert f"{tmp_path / 'o' / 'inspect.html'}: 8 sublayers on 64 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "exists already; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_widened_pretrained_model(tmp_path, text) -> None:
    """It has no run, so text and tokenizer are given; the page says nothing of the folders they lie in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from vwn import widen

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=260, max_position_embeddings=64)  # fmt: skip
    widen(LlamaForCausalLM(config), m=2, n=4).save_pretrained(tmp_path / "wide")
    given = dict(data=str(text), tokens=100)
    result = inspect_checkpoint(InspectConfig(str(tmp_path / "wide"), tmp_path / "o", tokenizer="bytes", **given))
    assert [s["name"] for s in result["sublayers"]] == ["attn 1", "mlp 1", "attn 2", "mlp 2"]
    assert result["window"] == 64
    page = (tmp_path / "o" / "inspect.html").read_text()
    assert str(tmp_path) not in page
    assert str(text.parent) not in page
    assert text.name in page
    with pytest.raises(UserError, match="--tokenizer"):
        inspect_checkpoint(InspectConfig(str(tmp_path / "wide"), tmp_path / "p", **given))
