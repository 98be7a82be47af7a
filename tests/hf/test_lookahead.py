"""How the model runs its connections: reads joined to writes across layers, states rebuilt, no bit changed."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from tiny import build, same_bits, step, token_ids, vwn_config
from vwn import GeneralizedHyperConnection, ops
from vwn.common.errors import UserError
from vwn.hf import layer as layer_module
from vwn.hf.lookahead import Lookahead

CASES = pytest.mark.parametrize(
    ("kind", "m", "n", "dtype"),
    [("llama", 2, 3, torch.float32), ("llama", 4, 16, torch.bfloat16), ("mixtral", 2, 3, torch.bfloat16)],
)
LAYERS = 3


def model_of(kind: str = "llama", m: int = 2, n: int = 3, mtp: int = 1, layers: int = LAYERS, **fields):
    """In training mode, with layers enough that one is neither first nor last."""
    return build(vwn_config(kind, m, n, {"num_hidden_layers": layers}, num_mtp_modules=mtp, **fields)).train()


@contextlib.contextmanager
def unfused():
    """Every connection reads and writes on its own, as the paper's eq. 10 has it."""

    def write_read(self, state, z, connection, reader):
        new = self.write(state, z, connection)
        return new, self.read(new, reader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "can_read_ahead", lambda *_: False)
        patch.setattr(Lookahead, "write_read", write_read)
        yield


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Counts the calls of the ops."""
    counts: Counter = Counter()

    def counted(name: str, op: Callable) -> Callable:
        return lambda *args: counts.update([name]) or op(*args)

    for name in ("read", "write", "write_read"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return counts


# Fused and unfused


@CASES
def test_fused_and_unfused_agree_to_the_bit(kind, m, n, dtype, backend):
    model = model_of(kind, m, n, dynamic=n != 16).to(dtype)
    model.set_connection_backend(backend)
    fused = step(model)
    with unfused():
        assert same_bits(step(model), fused)
    with pytest.MonkeyPatch.context() as patch:  # within a layer fused, between layers not
        patch.setattr(layer_module, "can_read_ahead", lambda *_: False)
        assert same_bits(step(model), fused)


def test_mixed_precision_changes_no_bit():
    model = model_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = step(model)
        model.model.keep_states_every = 2
        with unfused():
            assert same_bits(step(model), fused)


def test_reads_ahead(calls):
    model = model_of("mixtral")
    backbone = Counter(read=1, write_read=2 * LAYERS - 1, write=1)
    each_layer = Counter(read=1, write_read=1, write=1)
    step(model)
    assert calls == backbone + each_layer  # the module for one more token is a backbone of one layer
    calls.clear()
    model(token_ids())
    assert calls == backbone
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls.clear()
    model(token_ids(), use_cache=False)
    assert calls == Counter(dict.fromkeys(each_layer, LAYERS))
    calls.clear()
    model.eval()(token_ids())
    assert calls == backbone, "nothing is recomputed in evaluation"
    with unfused():
        calls.clear()
        model(token_ids())
        assert calls == Counter(read=2 * LAYERS, write=2 * LAYERS)


def test_norms_fused_into_the_reads(monkeypatch, backend):
    """What a GPU does, here on a CPU."""
    model = model_of("llama", 4, 16)
    model.set_connection_backend(backend)
    wanted = step(model)
    monkeypatch.setattr(GeneralizedHyperConnection, "fuses_norm", lambda *_: True)
    layers = model.model.backbone.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    kind = type(model.model.norm)  # what a layer's norm is a subclass of
    ran, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (ran.append(self), forward(self, x))[1])
    fused = step(model)
    assert ran
    assert not any(norm is other for norm in norms for other in ran)
    assert fused.keys() == wanted.keys()
    for name, x in fused.items():
        assert_close(x, wanted[name], rtol=1e-4, atol=1e-5 * float(1 + wanted[name].abs().max()))
    with unfused():
        assert same_bits(step(model), fused)
    model.model.keep_states_every = 2
    assert same_bits(step(model), fused)


# Hooks and other layers


def test_recorded_hidden_states_are_the_states():
    model = model_of()
    shorter = copy.deepcopy(model.model)
    shorter.backbone.layers = shorter.backbone.layers[:1]
    recorded = model(token_ids(), output_hidden_states=True).over_width_hidden_states
    assert torch.equal(recorded[1], shorter(token_ids()).over_width_state)
    assert same_bits(step(model, output_hidden_states=True), step(model))


def replace(state: Tensor) -> Tensor:
    return torch.cat([state[..., :5] + 3, state[..., 5:]], dim=-1)


def in_place(state: Tensor) -> None:
    state[..., :5].add_(3)


def after(layers: nn.ModuleList, change: Callable) -> None:
    layers[0].register_forward_hook(lambda _, args, output: change(output))


def before_the_next(layers: nn.ModuleList, change: Callable) -> None:
    def hook(_, args):
        state = change(args[0])
        return None if state is None else (state, *args[1:])

    layers[1].register_forward_pre_hook(hook)


HOOKS = pytest.mark.parametrize("change", [replace, in_place])
PLACES = pytest.mark.parametrize("place", [after, before_the_next])


@HOOKS
@PLACES
def test_hooks_that_change_the_state_in_training(place, change):
    model = model_of()
    without = step(model)
    place(model.model.backbone.layers, change)
    with unfused():
        wanted = step(model)
    assert not torch.isclose(wanted["loss"], without["loss"])
    for every in (1, 3):
        model.model.keep_states_every = every
        assert same_bits(step(model), wanted)


@HOOKS
@PLACES
def test_hooks_that_change_the_state_in_inference(place, change):
    model = model_of(layers=2, mtp=0).eval()
    place(model.model.backbone.layers, change)
    with torch.no_grad(), unfused():
        wanted = model(token_ids(), use_cache=False).logits
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(model(token_ids(), use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_hooks_that_change_the_state_in_a_compiled_model():
    model = model_of(layers=2, mtp=0).eval()
    after(model.model.backbone.layers, in_place)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(token_ids(), use_cache=False).logits
        assert_close(found, model(token_ids(), use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("order", "every"), [([0], 1), ([2, 1, 0], 2), ([0, 0, 2], 1), ([1, 1, 1], 2)])
def test_layers_removed_reordered_and_repeated(order, every):
    model = model_of()
    layers = model.model.backbone.layers
    model.model.backbone.layers = layers[: order[0] + 1] if len(order) == 1 else nn.ModuleList(layers[i] for i in order)
    model.model.keep_states_every = every
    found = step(model)
    with unfused():
        wanted = step(model)
    for name, x in found.items():
        assert torch.equal(x, wanted[name]) if name in wanted else not x.any(), name
    assert wanted.keys() <= found.keys()


# Gradient checkpointing


@CASES
def test_gradient_checkpointing_changes_no_bit(kind, m, n, dtype):
    model, ran = model_of(kind, m, n).to(dtype), []
    wanted = step(model)
    for layers in (model.model.backbone.layers, model.model.mtp[0].layer.layers):
        layers[0].mlp.register_forward_hook(lambda module, *_: ran.append(module))
    model.gradient_checkpointing_enable({"use_reentrant": dtype == torch.float32})
    assert model.is_gradient_checkpointing
    assert same_bits(step(model), wanted)
    assert sorted(Counter(ran).values()) == [2, 2]


def test_checkpointing_by_torchs_own_wrapper_changes_no_bit():
    """What FSDP's recipes, and accelerate with them, put around the layers."""
    model = model_of(mtp=0)
    wanted = step(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer_module.VirtualWidthLayer))
    found = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in step(model).items()}
    assert same_bits(found, wanted)


# Copies


def test_copies_read_ahead_for_their_own_layers(calls):
    model = model_of()
    wanted, names = step(model), list(model.state_dict())
    wanted_calls = Counter(calls)
    assert not [name for name in (*names, *dict(model.named_modules())) if "following" in name]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == names
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        calls.clear()
        assert same_bits(step(other), wanted)
        assert calls == wanted_calls
        model.load_state_dict(other.state_dict())


# States that are not kept


@CASES
def test_rebuilt_states_change_no_bit(kind, m, n, dtype, backend):
    model = model_of(kind, m, n).to(dtype)
    model.set_connection_backend(backend)
    wanted = step(model)
    for every in (2, 5):
        model.model.keep_states_every = every
        assert same_bits(step(model, output_hidden_states=every == 5), wanted)


def test_rebuilt_states_are_rebuilt_again_for_a_second_backward():
    model, ids = model_of(), token_ids()
    model.model.keep_states_every = 3
    loss = model(ids, labels=ids).loss
    leaves = list(model.parameters())
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wanted = step(model)
    named = dict(zip(dict(model.named_parameters()), first, strict=True))
    assert all(torch.equal(named[name], x) for name, x in wanted.items() if name != "loss")


@pytest.mark.parametrize("every", [1, 3])
def test_states_are_not_kept_and_rebuilt_once_each(monkeypatch, calls, every):
    states: list[StorageWeakRef] = []
    counted = ops.write_read

    def noted(*args):
        new, x = counted(*args)
        states.append(StorageWeakRef(new.untyped_storage()))
        return new, x

    monkeypatch.setattr(ops, "write_read", noted)
    model, ids = model_of(mtp=0), token_ids()
    model.model.keep_states_every = every

    def alive() -> int:  # nothing has to wait for the garbage collector
        return sum(not state.expired() for state in states)

    loss = model(ids, labels=ids, use_cache=False).loss
    assert len(states) == 2 * LAYERS - 1
    assert alive() == len(states) // every
    calls.clear()
    loss.backward()
    assert calls == Counter(write=len(states) - len(states) // every)
    assert alive() == 0
    states.clear()
    with torch.no_grad():
        model(ids)
    assert alive() == 0


def test_keeping_fewer_states_is_refused_where_it_cannot_be():
    model, ids = model_of(), token_ids()
    for every in (0, -1, 1.5):
        model.model.keep_states_every = every
        with pytest.raises(UserError, match=f"keep_states_every must be a whole number .*1 or more, got {every}"):
            model(ids)
    model.model.keep_states_every = 2
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"keep_states_every = 2 does not go through torch\.compile; set it to 1"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match=r"keep_states_every = 2 and gradient checkpointing .*; set it to 1"):
        model(ids, use_cache=False)
    model.eval()(ids)
    model.gradient_checkpointing_disable()
    model.train().model.layers[1].connections[0].bias_alpha.ds_id = 0  # as ZeRO marks what it shards
    with pytest.raises(UserError, match="sharded"):
        model(ids)


# Gradients switched off for a part, and things changed behind the backward's back


def test_a_frozen_bottom_run_without_gradients():
    """What was read ahead without a graph is not used where there is to be one."""
    model = model_of()
    bottom = model.model.backbone.layers[0]
    bottom.forward = torch.no_grad()(bottom.forward)
    fused = step(model)
    with unfused():
        assert same_bits(step(model), fused)


@pytest.mark.parametrize("every", [1, 3])
def test_weights_changed_before_the_backward_are_noticed(every):
    model = model_of()
    model.keep_states_every = every
    assert model.model.keep_states_every == every
    loss = model(token_ids(), labels=token_ids()).loss
    with torch.no_grad():
        model.model.backbone.layers[0].connections[0].bias_alpha.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_layers_compiled_one_by_one_share_their_graphs():
    torch._dynamo.reset()
    model = build(vwn_config("llama", 2, 4, {"num_hidden_layers": 6})).eval()
    wanted = model(token_ids()).logits
    counter = CompileCounterWithBackend("eager")
    for layer in model.model.backbone.layers:
        layer.compile(backend=counter)
    assert_close(model(token_ids(), use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2
