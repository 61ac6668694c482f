"""A rebuilt step takes the gradients of its convolutions from its first run, and only those."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext import convolution as convolutions
from mamlpp_ext.fast_kernels.known_gradients import KnownGradients

pytestmark = pytest.mark.usefixtures("float64")
STEPS, TASKS = 3, 2


class Net(nn.Module):
    """Weights that are adapted, used twice, made of what is adapted, and left to the outer loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.outer = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm(self.first(x))), 2)
        x = self.twice(torch.tanh(self.twice(x)))
        x = torch.tanh(F.conv2d(x, self.scale * self.outer.weight, self.outer.bias))
        return self.head(F.max_pool2d(self.outer(x), 2).flatten(1))


class Penalised(Net):
    """A convolution's backward runs in the forward, too: not with the inner gradient."""

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: self.first(x).square().sum())(x)
        return super().forward(x) + slope.square().mean()


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions take the closed form, which is left to larger ones for the sake of speed."""
    monkeypatch.setattr(convolutions, "_WORTH_A_FUNCTION", 0)


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    labels = torch.arange(5).expand(TASKS, -1)
    images = torch.randn(2, TASKS, 5, 1, 28, 28)
    return images[0], labels, images[1], labels


def gradients(net: nn.Module, batch: Any, **settings: Any) -> dict[str, Tensor]:
    net = mpp.convert_batchnorm(copy.deepcopy(net), STEPS)
    lslr = mpp.LSLR(net, STEPS, lr=0.1, adapt=lambda name: "outer" not in name)
    result = mpp.task_batch_loss(net, lslr, batch, F.cross_entropy, num_steps=STEPS, **settings)
    result.loss.backward()
    learned = [*net.named_parameters(), *lslr.named_parameters()]
    return {name: p.grad for name, p in learned if p.grad is not None}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, ...]]]:
    """Collects what every backward of a convolution was asked for."""
    asked: list[tuple[bool, ...]] = []
    real = convolutions._backward
    with monkeypatch.context() as patch:
        patch.setattr(
            convolutions, "_backward", lambda *args: asked.append(args[-1]) or real(*args)
        )
        yield asked


SETTINGS = [{}, {"aggregate": mpp.MultiStepLoss(STEPS, 10)}, {"chunk_size": 1}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["final step", "every step", "task by task"])
@pytest.mark.parametrize("model", [Net, Penalised])
def test_gradients_are_the_same(model: type[Net], batch: Any, settings: dict[str, Any]) -> None:
    net = model()
    expected = gradients(net, batch, **settings)
    found = gradients(net, batch, rematerialize=True, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert {"first.weight", "twice.weight", "outer.weight", "rates"} <= set(found)


def test_they_are_not_computed_again(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 0 and 1 are rebuilt; of their inner backwards the inputs' gradients alone are."""
    net = nn.Sequential(
        *[nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten()],
        nn.Linear(4 * 26 * 26, 5),
    )
    monkeypatch.setattr(mpp, "convert_batchnorm", lambda net, num_steps: net)
    with counted(monkeypatch) as plain:
        gradients(net, batch)
    with counted(monkeypatch) as again:
        gradients(net, batch, rematerialize=True)
    # The first two steps are run twice, for two convolutions each: once with and once without. The
    # last target loss has torch's own gradient.
    assert len(again) - len(plain) == 2 * 2 - 2
    weights = [sum(bool(wanted[1]) for wanted in asked) for asked in (plain, again)]
    assert weights[0] - weights[1] == 2


def test_a_second_backward_takes_them_again(batch: Any) -> None:
    net = mpp.convert_batchnorm(Net(), STEPS)
    lslr = mpp.LSLR(net, STEPS)
    result = mpp.task_batch_loss(
        net, lslr, batch, F.cross_entropy, num_steps=STEPS, rematerialize=True
    )
    first, second = (
        torch.autograd.grad(result.loss, list(net.parameters()), retain_graph=True)
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_when_they_are_known() -> None:
    """Within the inner backward, and of the weight's shape."""
    step = KnownGradients(torch.clone)
    weight = torch.randn(2, 1, 3, 3)
    slot = step.next_slot()
    assert step.next_slot() is not slot
    with step.in_the_inner_backward():
        slot.learn(weight, None)  # has a graph, or could have
        assert not slot.is_known(weight)
        with torch.no_grad():
            slot.learn(weight, torch.ones(2))
        assert slot.is_known(weight)
        assert not slot.is_known(weight[:1])
    assert not slot.is_known(weight)
    assert slot.of_weight is not weight
    step.begin()
    assert step.next_slot() is slot
    with torch.no_grad():
        other = step.next_slot()
        other.learn(weight, None)  # of another backward
    assert other.of_weight is None


def test_they_go_with_the_graph(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at Python's next collection of garbage: they are as large as the weights."""
    held: list[Any] = []
    real = KnownGradients.next_slot

    def seen(self: KnownGradients) -> Any:
        slot = real(self)
        held.append(weakref.ref(slot))
        return slot

    monkeypatch.setattr(KnownGradients, "next_slot", seen)
    gc.disable()
    try:
        gradients(Net(), batch, rematerialize=True)
        assert held
        assert not any(slot() for slot in held)
    finally:
        gc.enable()
