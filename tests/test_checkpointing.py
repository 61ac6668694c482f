"""Activation checkpointing inside of an inner loop: refused at its first step, in every path.

The backward runs a checkpointed layer again, and by then other weights stand in the model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from any_model import PATHS, STEPS, TASKS, assert_same, outcome, written_out

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]
REFUSED = r"activation checkpointing.*gradient_checkpointing_disable\(\).*rematerialize=True"


class Checkpointed(nn.Module):
    """Three layers, one of which is checkpointed."""

    def __init__(self, layer: int, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
        self.checkpointed, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i == self.checkpointed:
                x = checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
            else:
                x = layer(x).tanh()
        return x


def tasks() -> Any:
    return tuple(torch.randn(TASKS, 4, 3) for _ in range(4))


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize(
    ("layer", "reentrant"), [(0, False), (1, False), (1, True)], ids=["first", "inner", "reentrant"]
)
@pytest.mark.parametrize("path", PATHS)
def test_refused(path, layer, reentrant, second_order, unchanged) -> None:
    net = Checkpointed(layer, reentrant)
    with unchanged(net), pytest.raises(RuntimeError, match=REFUSED):
        outcome(PATHS[path], net, tasks(), second_order=second_order)


@pytest.mark.parametrize("path", ["plain loop", "higher", "torchopt", "chunk_size=1"])
def test_reentrant_without_an_input_that_needs_a_gradient(path) -> None:
    """As everywhere in torch, such a layer gets none, and torch has warned of it."""
    net, batch = Checkpointed(0, True), tasks()
    expected = outcome(written_out, net, batch, second_order=True)
    assert expected["layers.0.weight"] is None
    assert_same(outcome(PATHS[path], net, batch, second_order=True), expected)


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("path", ["torchopt", "chunk_size=1"])
def test_of_what_is_not_adapted_it_is_right(path, second_order) -> None:
    """No inner gradient passes there, and in the outer backward its own weights are in place."""
    batch = tasks()
    found, expected = (
        outcome(way, net, batch, second_order=second_order, adapt=["layers.[12].*"])
        for way, net in zip(
            (PATHS[path], written_out),
            (seeded(Checkpointed(0, False)), seeded(Checkpointed(-1, False))),
            strict=True,
        )
    )
    assert_same(found, expected)


def seeded(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in net.parameters():
        p.data.normal_()
    return net


@pytest.mark.parametrize("path", PATHS)
def test_hooks_around_the_whole_loop_are_fine(path) -> None:
    net, batch = Checkpointed(-1, False), tasks()
    expected = outcome(written_out, net, batch, second_order=True)
    with save_on_cpu():
        found = outcome(PATHS[path], net, batch, second_order=True)
    assert_same(found, expected)


def test_hooks_can_be_used_again_after_a_refusal() -> None:
    net = Checkpointed(1, False)
    with pytest.raises(RuntimeError, match=REFUSED):
        mpp.functional_call(net, dict(net.named_parameters()), torch.randn(2, 3))
    with save_on_cpu():
        net.layers[0](torch.randn(2, 3)).sum().backward()
    lslr = mpp.LSLR(net, STEPS)
    with pytest.raises(RuntimeError, match=REFUSED):
        mpp.task_batch_loss(net, lslr, tasks(), nn.functional.mse_loss, num_steps=STEPS)
    with save_on_cpu():
        net.layers[0](torch.randn(2, 3)).sum().backward()
