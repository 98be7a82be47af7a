"""Forward hooks see every read, write and reduce once, and what they return is what the model goes on with."""

from __future__ import annotations

import copy

import pytest
import torch

import vwn
from conftest import perturb
from tiny import build, vwn_config
from vwn.nn.connection import Read, Write

KINDS = [
    {},
    {"carry_constraint": "doubly_stochastic", "n": 4},
    {"m": 1, "n": 3, "connection": "hc", "embedding": "replicated", "reduce": "sum"},
    {"m": 1, "n": 3, "connection": "mhc", "embedding": "replicated", "reduce": "sum"},
]
IDS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))


def operations(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Read | Write) or name.endswith("reduce")
    }


@pytest.mark.parametrize(("fields", "grad"), [*((fields, False) for fields in KINDS), (KINDS[0], True)], ids=str)
def test_hooks_see_every_operation_once_and_change_no_bit(fields, grad):
    model = build(vwn_config(num_mtp_modules=1, **fields))
    seen, hooks = [], []
    with torch.set_grad_enabled(grad):
        plain = model(IDS, labels=IDS)
        for name, module in operations(model).items():

            def note(module, args, out, name=name):
                seen.append((name, args[0], out))

            hooks.append(module.register_forward_hook(note))
        looked_at = model(IDS, labels=IDS)
    assert torch.equal(looked_at.logits, plain.logits)
    assert torch.equal(looked_at.loss, plain.loss)
    names = [name for name, _, _ in seen]
    assert sorted(names) == sorted(operations(model)), names
    layers = [name for name in names if ".mtp." not in name and ".connections." in name]
    assert [name.rsplit(".", 1)[1] for name in layers] == ["read", "write"] * 4
    state = None
    for name, before, out in seen:  # each works on what the one before it left
        if name in layers:
            if name.endswith("read"):
                assert state is None or torch.equal(before, state)
                assert out.shape[-1] == 24
            else:
                state = out
    for hook in hooks:
        hook.remove()
    count = len(seen)
    model(IDS)
    assert len(seen) == count


@pytest.mark.parametrize(("sublayer", "operation"), [(0, "write"), (1, "read")])
def test_what_a_hook_returns_is_used_with_its_gradient(sublayer, operation):
    """Also where states are rebuilt: those are not the unchanged ones."""
    model = build(vwn_config()).train()
    push = torch.randn(24 if operation == "read" else 36, generator=torch.Generator().manual_seed(1))
    results = []
    for keep in (1, 2):
        model.model.keep_states_every = keep
        module = getattr(model.model.layers[0].connections[sublayer], operation)
        hook = module.register_forward_hook(lambda module, args, out: out * 0.5 + push)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad()
        hook.remove()
    assert (results[0][0] - model(IDS, labels=IDS).loss).abs() > 1e-3
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_hooks_on_a_layers_norm_see_tensors():
    model, seen = build(vwn_config()), []
    for module in (model.model.layers[0].connections[0].read, model.model.layers[0].input_layernorm):
        module.register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    model(IDS)
    assert type(seen[2]) is torch.Tensor
    assert torch.equal(seen[2], seen[1])


def test_pre_hooks_change_what_is_read_and_written():
    connection = perturb(vwn.GeneralizedHyperConnection(12, 2, 3))
    following = perturb(vwn.GeneralizedHyperConnection(12, 2, 3), seed=1)
    state, z = torch.randn(5, 18), torch.randn(5, 12)
    connection.write.register_forward_pre_hook(lambda module, args: (args[0], 2 * args[1]))
    following.read.register_forward_pre_hook(lambda module, args: (-args[0], *args[1:]))
    new, x = connection.write_read(state, z, following)
    assert torch.equal(new, connection._write(state, 2 * z))
    assert torch.equal(x, following._read(-new))


def test_copies_read_with_their_own_weights():
    connection = perturb(vwn.GeneralizedHyperConnection(12, 2, 3))
    twin = copy.deepcopy(connection)
    with torch.no_grad():
        twin.bias_alpha.add_(1)
    state = torch.randn(5, 18)
    assert twin.read.connection is twin
    assert not torch.equal(twin.read(state), connection.read(state))
    assert set(connection.state_dict()) == set(dict(connection.named_parameters()))


def test_a_sublayer_that_returns_a_tuple_is_refused_with_a_way_out():
    connection, other = (vwn.GeneralizedHyperConnection(12, 2, 3) for _ in range(2))
    state = torch.randn(5, 18)

    def attention(x):
        return x, None

    for call in (
        lambda: connection(state, attention),
        lambda: connection.write(state, attention(state)),
        lambda: connection.write_read(state, attention(state), other),
        lambda: connection(state, lambda x: None),
    ):
        with pytest.raises(vwn.UserError, match=r"returned a (tuple|NoneType).*sublayer\(x\)\[0\]"):
            call()
    connection(state, lambda x: attention(x)[0])
