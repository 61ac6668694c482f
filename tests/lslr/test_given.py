"""An update of weights in a list, as functional nets and torch.autograd.grad have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")


def functional_net(x: Tensor, weights: list[Tensor]) -> Tensor:
    return torch.tanh(x @ weights[0].T + weights[1]) @ weights[2].T


@pytest.fixture
def weights() -> nn.ParameterList:
    return nn.ParameterList([torch.randn(4, 3), torch.randn(4), torch.randn(1, 4)])


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_weights(weights: nn.ParameterList, kind: type) -> None:
    """Meta-gradients of weights and rates equal those of a loop written out."""
    lslr, x = mpp.LSLR(weights, 2), torch.randn(5, 3)
    lslr.rates.data.uniform_(0.1, 0.5)
    leaves = [*weights, lslr.rates]

    def meta_loss(by_update: bool) -> Tensor:
        fast = kind(weights)
        for step in range(2):
            loss = functional_net(x, fast).square().mean()
            grads = torch.autograd.grad(loss, fast, create_graph=True)
            if by_update:
                fast = lslr.update(fast, grads, step)
                assert type(fast) is list
            else:
                rates = lslr.rates[:, step]
                fast = [w - r * g for w, r, g in zip(fast, rates, grads, strict=True)]
        return functional_net(x, fast).square().mean()

    ours, theirs = (
        torch.autograd.grad(meta_loss(by_update), leaves) for by_update in (True, False)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradients_in_order_for_weights_by_name(net: nn.Module, lslr: mpp.LSLR) -> None:
    """What is not adapted stays among the weights; None leaves a weight as it is."""
    params = dict(net.named_parameters())
    grads = [torch.ones_like(params[name]) for name in lslr.names]
    by_name = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), 1)
    in_order = lslr.update(params, grads, 1)
    assert in_order.keys() == params.keys()
    torch.testing.assert_close(in_order, by_name, rtol=0, atol=0)
    without = lslr.update(params, [None, *grads[1:]], 1)
    assert without[lslr.names[0]] is params[lslr.names[0]]


def test_the_rate_at_first_is_kept() -> None:
    assert mpp.LSLR(nn.Linear(2, 1), 3, lr=0.25).lr == 0.25
