"""Calls with other weights: every place of each is replaced, and put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp
from any_model import PATHS, assert_same, outcome, written_out

pytestmark = pytest.mark.usefixtures("float64")


class Twice(nn.Module):
    """A module under two names, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.tied(self.again(self.first(x).tanh())) + self.shift


def test_every_place_is_replaced(unchanged) -> None:
    net, x = Twice(), torch.randn(4, 3)
    params = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    weight, bias = params["first.weight"], params["first.bias"]
    h = (x @ weight.T + bias).tanh() @ weight.T + bias
    with unchanged(net):
        found = mpp.functional_call(net, params, x, {"scale": 2.0})
        torch.testing.assert_close(found, 2 * h @ weight.T + 1)
        assert isinstance(net.first.weight, nn.Parameter)
        assert net.tied.weight is net.first.weight


@pytest.mark.parametrize("name", ["first.weight", "again.weight", "tied.weight"])
def test_by_any_of_its_names(name) -> None:
    net, x = Twice(), torch.randn(4, 3)
    weight = torch.randn(3, 3)
    expected = mpp.functional_call(net, {"first.weight": weight}, (x,))
    torch.testing.assert_close(mpp.functional_call(net, {name: weight}, x), expected)


def test_buffers() -> None:
    net, x = Twice(), torch.randn(4, 3)
    found = mpp.functional_call(net, {"shift": torch.zeros(3)}, x)
    torch.testing.assert_close(found, net(x) - 1)


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("path", PATHS)
def test_a_module_under_two_names_in_every_path(path, second_order) -> None:
    net = Twice()
    batch = tuple(torch.randn(2, 4, 3) for _ in range(4))
    expected = outcome(written_out, net, batch, second_order=second_order)
    assert_same(outcome(PATHS[path], net, batch, second_order=second_order), expected)


class Child(nn.Module):
    """A layer that holds the model it is in."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.parent = parent


def test_a_model_within_itself() -> None:
    net, x = nn.Module(), torch.randn(4, 3)
    net.child = Child(net)
    net.forward = lambda x: x @ net.child.weight
    weight = torch.randn(3, 3)
    for name in ("child.weight", "child.parent.child.weight"):
        torch.testing.assert_close(mpp.functional_call(net, {name: weight}, x), x @ weight)


def test_a_forward_that_raises_leaves_the_model_as_it_was(unchanged) -> None:
    net = Twice()
    params = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    with unchanged(net), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mpp.functional_call(net, params, torch.randn(4, 2))
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_a_scripted_layer() -> None:
    net, x = nn.Sequential(torch.jit.script(nn.Linear(3, 2)), nn.Tanh()), torch.randn(4, 3)
    params = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    found = mpp.functional_call(net, params, x)
    torch.testing.assert_close(found, (x @ params["0.weight"].T + params["0.bias"]).tanh())
    net.requires_grad_(False)
    assert not torch.equal(found, net(x))
