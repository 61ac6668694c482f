"""Gradients that are sparse, and weights that are complex: adapted as in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp
from any_model import PATHS, TASKS, assert_same, outcome, written_out

torchopt = pytest.importorskip("torchopt")

from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")


class Words(nn.Module):
    """Scores words, of whose vectors a batch has a few."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 4, sparse=sparse)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).tanh().mean(1))


class Waves(nn.Module):
    """Has complex weights beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.shift = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex128) @ self.phase + self.shift).abs())


def words() -> Any:
    drawn = (torch.randint(20, (TASKS, 5, 3)), torch.zeros(TASKS, 5))
    return (*drawn, torch.randint(20, (TASKS, 5, 3)), torch.zeros(TASKS, 5))


def waves() -> Any:
    drawn = (torch.randn(TASKS, 5, 3), torch.zeros(TASKS, 5))
    return (*drawn, torch.randn(TASKS, 5, 3), torch.zeros(TASKS, 5))


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("make", "batch"), [(Words, words), (Waves, waves)], ids=["sparse", "complex"]
)
def test_every_path(make: Any, batch: Any, path: str, second_order: bool) -> None:
    torch.manual_seed(0)
    net, tasks = make(), batch()
    expected = outcome(written_out, net, tasks, second_order=second_order)
    assert all(t is not None and t.count_nonzero() for t in expected.values())
    assert_same(outcome(PATHS[path], net, tasks, second_order=second_order), expected)


def test_sparse_gradients_are_those_of_dense_ones() -> None:
    torch.manual_seed(0)
    net, tasks = Words(), words()
    dense = Words(sparse=False)
    dense.load_state_dict(net.state_dict())
    found, expected = (
        outcome(PATHS["higher"], model, tasks, second_order=True) for model in (net, dense)
    )
    assert_same(found, expected)


def test_sparse_gradients_in_a_chain_of_torchopt() -> None:
    """Whose own rule of sparse gradients and rates that learn there is none."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net, (x, *_) = Words(sparse), words()
        lslr = mpp.LSLR(net, 2)
        weights = torchopt.extract_state_dict(net, by="reference")
        inner_opt = torchopt.MetaOptimizer(net, mpp_torchopt.lslr_transform(lslr))
        for _ in range(2):
            inner_opt.step(net(x[0]).square().sum())
        net(x[0]).square().sum().backward()
        torchopt.recover_state_dict(net, weights)
        found.append(
            {n: p.grad.to_dense() for n, p in [*net.named_parameters(), ("rates", lslr.rates)]}
        )
    assert_same(*found)


def test_complex_rates_learn_as_real_ones_do() -> None:
    """A complex weight is two real ones, and its rate the rate of both."""
    torch.manual_seed(0)
    net = Waves()
    lslr = mpp.LSLR(net, 1)
    params = dict(net.named_parameters())
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    sum(p.abs().sin().sum() for p in lslr.update(params, grads, 0).values()).backward()
    for i, name in enumerate(lslr.names):
        rate = lslr.rates.detach()[i, 0].clone().requires_grad_()
        p, g = copy.deepcopy(params[name]).detach(), grads[name]
        if p.is_complex():
            p, g = torch.view_as_real(p), torch.view_as_real(g)
            size = (p - rate * g).square().sum(-1).sqrt()
        else:
            size = (p - rate * g).abs()
        size.sin().sum().backward()
        torch.testing.assert_close(lslr.rates.grad[i, 0], rate.grad)
