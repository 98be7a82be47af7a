"""Against another author's code: the package `hyper-connections` (lucidrains), whose fractions are GHC with tied rows.

Its slot is a pair (fraction f, stream s); ours is `j = s * m + f`, so that `j mod m` is the fraction. Its columns are,
for each fraction of the result, first the branch input and then the streams. What it computes:

- static `A` is free, as ours; static `B` is one number per slot, so the rows of our `B` are tied;
- dynamic `A` is ours with one scalar scale and no `tau`;
- dynamic `B` is ours only for one fraction: with more, it indexes the normalised slot by the *source* fraction, where
  the paper (eq. 14) has the slot written to, so no choice of our parameters equals it and it is compared at zero.
"""

from __future__ import annotations

import pytest
import torch
from hyper_connections.hyper_connections import HyperConnections
from torch import Tensor
from torch.testing import assert_close

from conftest import perturb
from their_connections import columns, run_theirs, slot_rows
from vwn import GeneralizedHyperConnection


@torch.no_grad()
def translated(theirs: HyperConnections, hidden_size: int) -> GeneralizedHyperConnection:
    s, f = theirs.num_residual_streams, theirs.num_fracs
    ours = GeneralizedHyperConnection(hidden_size, f, s * f, eps=0.0).double()
    read, carry = columns(s, f)
    d = hidden_size // f
    ours.bias_alpha.copy_(theirs.static_alpha[slot_rows(s, f)][:, read + carry])
    ours.bias_beta.copy_(theirs.static_beta.expand(f, s * f))
    ours.dynamic_alpha.copy_(theirs.dynamic_alpha_fn[:, read + carry] * d**0.5)
    ours.dynamic_beta.copy_(theirs.dynamic_beta_fn.reshape(d, f) * d**0.5)
    ours.scale_alpha.fill_(theirs.dynamic_alpha_scale)
    ours.scale_beta.fill_(theirs.dynamic_beta_scale)
    ours.slot_norm.copy_(theirs.norm.gamma + 1)
    return ours


def their_connection(streams: int, fractions: int, hidden_size: int) -> HyperConnections:
    theirs = HyperConnections(streams, dim=hidden_size, num_fracs=fractions, layer_index=0).double()
    return perturb(theirs, seed=streams * 10 + fractions, scale=0.5)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("streams", "fractions"), [(1, 1), (4, 1), (1, 3), (2, 2), (3, 2), (8, 8)])
def test_static_equals_the_package(streams, fractions):
    hidden_size = 6 * fractions
    theirs = their_connection(streams, fractions, hidden_size)
    with torch.no_grad():
        theirs.dynamic_alpha_fn.zero_()
        theirs.dynamic_beta_fn.zero_()
    dynamic = translated(theirs, hidden_size)
    static = GeneralizedHyperConnection(hidden_size, fractions, streams * fractions, dynamic=False).double()
    static.load_state_dict({k: v for k, v in dynamic.state_dict().items() if k in static.state_dict()})
    weight = torch.randn(hidden_size, hidden_size, dtype=torch.float64)
    state = torch.randn(2, 3, hidden_size * streams, dtype=torch.float64)

    def sublayer(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight)

    wanted = run_theirs(theirs, state, sublayer)
    assert_close(static(state, sublayer), wanted, rtol=1e-10, atol=1e-10)
    assert_close(dynamic(state, sublayer), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("streams", "fractions"), [(1, 1), (4, 1), (1, 3), (3, 2)])
def test_dynamic_equals_the_package_where_the_formulas_agree(streams, fractions):
    hidden_size = 6 * fractions
    theirs = their_connection(streams, fractions, hidden_size)
    if fractions > 1:
        with torch.no_grad():
            theirs.dynamic_beta_fn.zero_()
    weight = torch.randn(hidden_size, hidden_size, dtype=torch.float64)
    state = torch.randn(2, 3, hidden_size * streams, dtype=torch.float64)
    wanted = run_theirs(theirs, state, lambda x: torch.tanh(x @ weight))
    ours = translated(theirs, hidden_size)
    assert_close(ours(state, lambda x: torch.tanh(x @ weight)), wanted, rtol=1e-9, atol=1e-9)
