"""Tensors that share memory with buffers: together in higher's copies, too, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from loops_of_state import STEPS, in_higher, in_place_of_all, in_torchopt
from mamlpp_ext.integrations import higher as mpp_higher

pytestmark = pytest.mark.usefixtures("float64")


class Held:
    """An object that holds a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Table(nn.Module):
    """Scales by the row of a table, and moves the row's values in its own way.

    Args:
        make: gives the model its table and row, and returns what finds the row in it.
        move: what a forward does to the row, or to what it is a row of.
    """

    table: Tensor

    def __init__(self, make: Callable[[Any], Any], move: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.layer, self.move = nn.Linear(3, 2), move
        self.find = make(self)

    @property
    def row(self) -> Tensor:
        return self.find(self)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        self.move(self, x.detach().mean(0))
        return self.layer(x * (1 + self.row + self.table.sum(0)))


def a_view_of_a_buffer(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    net.view = net.table[1]
    return lambda net: net.view


def a_view_in_containers(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    net.views = {"of": [net.table[1]]}
    return lambda net: net.views["of"][0]


def a_buffer_that_is_a_view(net: Any) -> Any:
    net.table = torch.zeros(2, 3)
    net.register_buffer("second", net.table[1])
    return lambda net: net.second


def buffers_of_one_memory(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(3, 2).T)
    net.register_buffer("second", net.table[1])
    return lambda net: net.second


def a_buffer_of_a_layer(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    net.layer.register_buffer("second", net.table[1])
    net.layer.same = net.layer.second
    return lambda net: net.layer.same


def a_view_in_a_function(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    view = net.table[1]
    net.views = lambda: view
    return lambda net: net.views()


def a_view_in_a_partial(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    net.views = partial(torch.clone, net.table[1])
    return lambda net: net.views.args[0]


def a_view_in_a_hook(net: Any) -> Any:
    net.register_buffer("table", torch.zeros(2, 3))
    view = net.table[1]
    net.layer.register_forward_pre_hook(lambda layer, args: (args[0] * (1 + view),))
    return lambda net: net.table[1]


def table_written(net: Any, mean: Tensor) -> None:
    net.table[1] += mean


def row_written(net: Any, mean: Tensor) -> None:
    net.row.mul_(0.9).add_(mean)


def row_written_through_data(net: Any, mean: Tensor) -> None:
    net.row.data.add_(mean)


MAKES = (
    *(a_view_of_a_buffer, a_view_in_containers, a_buffer_that_is_a_view),
    *(buffers_of_one_memory, a_buffer_of_a_layer),
    *(a_view_in_a_function, a_view_in_a_partial, a_view_in_a_hook),
)
MOVES = table_written, row_written, row_written_through_data


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("path", [in_higher, in_torchopt])
def test_what_shares_memory_does_so_in_every_path(path: Any, make: Any, move: Any) -> None:
    found = []
    for run in (path, in_place_of_all):
        torch.manual_seed(0)
        net = Table(make, move)
        lslr, x, y = mpp.LSLR(net, STEPS), torch.randn(4, 3), torch.randn(4, 2)
        for _ in range(2):  # two tasks in turn: the second begins with what the first left
            run(net, lslr, x, y).backward()
        assert net.row.untyped_storage().data_ptr() == net.table.untyped_storage().data_ptr()
        assert net.row.abs().sum() > 0
        found.append([*(p.grad for p in net.parameters()), lslr.rates.grad, net.row, net.table])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", MAKES)
def test_after_a_failure_or_in_test_mode_they_are_as_before(make: Any) -> None:
    net = Table(make, row_written)
    lslr, x, y = mpp.LSLR(net, STEPS), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ValueError, match="inner step 2"):
        in_higher(net, lslr, x, y, STEPS + 1)
    with mpp_higher.innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
        diffopt.step(F.mse_loss(fnet(x), y))
    assert not net.table.any()
    assert not net.row.any()


def through_the_object(net: Any, mean: Tensor) -> None:
    net.held.tensor.add_(mean)


def of_the_buffer(net: Any, mean: Tensor) -> None:
    net.table[1] += mean


class Kept(NamedTuple):
    """A container that references are not followed into."""

    tensor: Tensor


@pytest.mark.parametrize("move", [through_the_object, of_the_buffer])
@pytest.mark.parametrize("kind", [Held, Kept])
@pytest.mark.parametrize("hold", [lambda table: table, lambda table: table[1:]])
def test_buffers_that_objects_hold_are_refused_once_changed(
    move: Any, kind: Any, hold: Any
) -> None:
    def make(net: Any) -> Any:
        net.register_buffer("table", torch.zeros(2, 3))
        net.held = kind(hold(net.table))
        return lambda net: net.table[1]

    net = Table(make, move)
    lslr, x, y = mpp.LSLR(net, STEPS), torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(RuntimeError, match="an object in the attribute 'held' of this Table"):
        in_higher(net, lslr, x, y)
    assert not net.table.any()
    net.move = lambda net, mean: None
    in_higher(net, lslr, x, y).backward()  # nothing changes it
    assert net.layer.weight.grad is not None
