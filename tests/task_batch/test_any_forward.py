"""What a stranger's forward may do besides calling layers: right in every path, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from any_model import PATHS, assert_same, outcome, size_of_outputs, written_out

pytestmark = pytest.mark.usefixtures("float64")

EACH_ORDER = pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])


def batch_of(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tasks of three examples."""
    x, x_target = torch.randn(2, 2, 3, *shape)
    y, y_target = torch.randn(2, 2, 3)
    return x, y, x_target, y_target


class Slope(nn.Sequential):
    """Returns the slope of an energy by the input, as a physicist's net does."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = super().forward(x).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Sensitivity(nn.Sequential):
    """Returns how an output depends on a hidden layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self[0](x)
        energy = self[2](self[1](hidden)).sum()
        return torch.autograd.grad(energy, hidden, create_graph=True)[0]


class SlopeOfFunction(Slope):
    """The same slope by ``torch.func``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: nn.Sequential.forward(self, x).sum())(x)


class Averaging(nn.Linear):
    """Puts a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean(0)
        return output * self.mean


class AveragingInPlace(Averaging):
    """Writes its buffer."""

    def forward(self, x: Tensor) -> Tensor:
        output = nn.Linear.forward(self, x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(output.mean(0), alpha=0.1)
        return output * self.mean.clone()


class Drawing(nn.Linear):
    """Draws from Python's generator, which nobody replays."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.uniform(0.5, 1.5)


class Requiring(nn.Linear):
    """Asks for a gradient in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone().detach_().requires_grad_() * self.weight.sum()


def encoder_in_eval_mode() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0).eval()


ALONE = ("plain loop", "higher", "torchopt", "chunk_size=1")
RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "a slope by the input": (Slope, (4,), ALONE),
    "a slope by torch.func": (SlopeOfFunction, (4,), tuple(PATHS)),
    "a slope by a hidden layer": (Sensitivity, (4,), tuple(PATHS)),
    "an encoder in eval mode": (encoder_in_eval_mode, (3, 4), tuple(PATHS)),
    "a buffer assigned": (Averaging, (4,), ALONE),
    "a buffer written": (AveragingInPlace, (4,), ALONE),
}


@EACH_ORDER
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_or_refused(name: str, path: str, second_order: bool) -> None:
    make, shape, right = RIGHT[name]
    net, batch = make(), batch_of(*shape)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    if path not in right:
        lslr = mpp.LSLR(net, 2, 0.05)
        with pytest.raises(RuntimeError, match="pass chunk_size=1"):
            PATHS[path](net, lslr, batch, size_of_outputs, second_order)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        assert all(type(t) is Tensor for t in net.buffers())
        net(batch[0][0])  # no tensor of vmap's has stayed in it
        return
    expected = outcome(written_out, net, batch, second_order=second_order)
    assert_same(outcome(PATHS[path], net, batch, second_order=second_order), expected)


@EACH_ORDER
@pytest.mark.parametrize("make", [Averaging, AveragingInPlace])
def test_a_buffer_that_changes_is_replayed(make: Any, second_order: bool) -> None:
    net, batch = make(), batch_of(4)
    expected = outcome(written_out, net, batch, second_order=second_order)

    def path(*args: Any) -> Tensor:
        return mpp.task_batch_loss(
            *args[:4],
            num_steps=2,
            second_order=args[4],
            aggregate=lambda losses: losses.mean(-1),
            rematerialize=True,
            chunk_size=1,
        ).loss

    assert_same(outcome(path, net, batch, second_order=second_order), expected)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_what_cannot_be_replayed_is_refused(chunk_size: int | None) -> None:
    net, batch = Drawing(4, 2), batch_of(4)

    def backward() -> None:
        mpp.task_batch_loss(
            net,
            mpp.LSLR(net, 2, 0.05),
            batch,
            size_of_outputs,
            num_steps=2,
            rematerialize=True,
            chunk_size=chunk_size,
        ).loss.backward()

    with pytest.raises(RuntimeError, match="come to something else"):
        backward()


def test_vmap_outside_of_the_forward_says_so_too() -> None:
    net, batch = Requiring(4, 2), batch_of(4)
    with pytest.raises(RuntimeError, match="pass chunk_size=1"):
        mpp.task_batch_loss(net, mpp.LSLR(net, 2), batch, size_of_outputs, num_steps=2)


@EACH_ORDER
def test_equal_tasks_have_equal_losses_with_padding(second_order: bool) -> None:
    net = nn.Sequential(nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 2))
    ids = torch.tensor([[[0, 1, 2], [3, 0, 0]]]).repeat(3, 1, 1)
    labels = torch.randn(1, 2, 3, 2).repeat(3, 1, 1, 1)
    batch, lslr = (ids, labels, ids, labels), mpp.LSLR(net, 2, 0.5)
    result = mpp.task_batch_loss(
        net, lslr, batch, F.mse_loss, num_steps=2, second_order=second_order
    )
    result.loss.backward()
    assert result.step_losses.max(0).values.equal(result.step_losses.min(0).values)
    assert not net[0].weight.grad[0].any()


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("make", "chunk_size"), [(Slope, 1), (SlopeOfFunction, None)])
def test_losses_that_do_not_count_of_a_slope(
    make: Any, chunk_size: int | None, grad_mode: Any
) -> None:
    net, batch = make(), batch_of(4)
    lslr = mpp.LSLR(net, 3, 0.05)
    how = {"num_steps": 3, "chunk_size": chunk_size}
    every = mpp.task_batch_loss(
        net, lslr, batch, size_of_outputs, aggregate=lambda t: t.mean(-1), **how
    )
    with grad_mode():
        result = mpp.task_batch_loss(net, lslr, batch, size_of_outputs, **how)
    torch.testing.assert_close(result.step_losses, every.step_losses)
    assert not result.step_losses.requires_grad
