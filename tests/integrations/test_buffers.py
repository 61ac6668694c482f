"""Buffers through the adapters: what a forward does to them is what it does in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from loops_of_state import PATHS, STEPS, in_place_of_all
from mamlpp_ext.integrations import higher as mpp_higher

pytestmark = pytest.mark.usefixtures("float64")

Change = Callable[[Any, Tensor], None]


class Keeping(nn.Module):
    """A layer that scales by what it keeps, and changes that in its own way."""

    def __init__(self, change: Change, kept: Tensor | None) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(3, 2), change
        self.register_buffer("kept", kept)
        self.register_buffer("fixed", torch.linspace(0.5, 1.5, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x.detach())
        kept = getattr(self, "kept", None)
        scale = 1.0 if kept is None else kept.sum().cos()
        return self.layer(x * self.fixed) * scale


def in_place(net: Any, x: Tensor) -> None:
    net.kept.mul_(0.9).add_(x.mean(0))


def by_data(net: Any, x: Tensor) -> None:
    """As older code does it: the buffer's own counter does not see it."""
    net.kept.data.mul_(0.9).add_(x.mean(0))


def assigned(net: Any, x: Tensor) -> None:
    net.kept = 0.9 * net.kept + x.mean(0)


def grown(net: Any, x: Tensor) -> None:
    net.kept = torch.cat([net.kept, x.mean(0)])


def resized(net: Any, x: Tensor) -> None:
    net.kept.resize_(net.kept.numel() + 1)[-1] = x.mean()


def made(net: Any, x: Tensor) -> None:
    net.kept = x.mean(0) if net.kept is None else net.kept + 1


def emptied(net: Any, x: Tensor) -> None:
    net.kept = None


def registered(net: Any, x: Tensor) -> None:
    net.register_buffer("seen", x.mean(0))


def deleted(net: Any, x: Tensor) -> None:
    if hasattr(net, "kept"):
        del net.kept


def nothing(net: Any, x: Tensor) -> None:
    """Leaves it."""


CASES: dict[str, tuple[Change, Callable[[], Tensor | None]]] = {
    "in place": (in_place, lambda: torch.ones(3)),
    "through data": (by_data, lambda: torch.ones(3)),
    "assigned": (assigned, lambda: torch.ones(3)),
    "assigned, expanded": (assigned, lambda: torch.ones(1).expand(3)),
    "left, expanded": (nothing, lambda: torch.ones(1).expand(3)),
    "grown": (grown, lambda: torch.ones(3)),
    "resized": (resized, lambda: torch.ones(3)),
    "None at first": (made, lambda: None),
    "None at last": (emptied, lambda: torch.ones(3)),
    "one that is new": (registered, lambda: torch.ones(3)),
    "one that is deleted": (deleted, lambda: torch.ones(3)),
    "left": (nothing, lambda: torch.ones(3)),
    "left, None": (nothing, lambda: None),
    "NaN": (nothing, lambda: torch.full((3,), torch.nan)),
}


def problem(case: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    change, kept = CASES[case]
    return Keeping(change, kept()), [torch.randn(4, 3), torch.randn(4, 2)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_buffers_come_back_as_in_plain_torch(case: str, path: str) -> None:
    found = []
    for run in (PATHS[path], in_place_of_all):
        net, (x, y) = problem(case)
        lslr = mpp.LSLR(net, STEPS)
        for _ in range(2):  # two tasks in turn
            run(net, lslr, x, y).backward()
        assert not any(b.requires_grad for b in net.buffers())
        found.append([net.layer.weight.grad, lslr.rates.grad, net.state_dict()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["left", "left, expanded", "assigned", "grown", "NaN"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_from_before_can_still_be_gone_back(case: str, path: str, fails: bool) -> None:
    """Bare higher allows that a buffer is part of a graph already, and so does plain torch."""
    net, (x, y) = problem(case)
    kept = net.kept
    before = (net.layer.weight * kept).sum() * (net.layer.weight * net.fixed).sum()
    lslr = mpp.LSLR(net, STEPS)
    if fails:
        with pytest.raises(ValueError, match="inner step 2"):
            PATHS[path](net, lslr, x, y, STEPS + 1)
    else:
        PATHS[path](net, lslr, x, y).backward()
    before.backward()
    assert (net.kept is kept) == (case not in ("assigned", "grown") or fails)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_a_failure_leaves_the_buffers_as_they_were(case: str, path: str) -> None:
    net, (x, y) = problem(case)
    places = {name: (b, copy.deepcopy(b)) for name, b in net._buffers.items()}
    with pytest.raises(ValueError, match="inner step 2"):
        PATHS[path](net, mpp.LSLR(net, STEPS), x, y, STEPS + 1)
    assert net._buffers.keys() == places.keys()
    for name, (buffer, value) in places.items():
        if case != "resized":
            assert net._buffers[name] is buffer
        torch.testing.assert_close(net._buffers[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("change", [in_place, assigned])
def test_what_the_model_itself_did_meanwhile_stays(change: Change) -> None:
    net = Keeping(change, torch.ones(3))
    lslr, x = mpp.LSLR(net, STEPS), torch.randn(4, 3)
    with mpp_higher.innerloop_ctx(net, lslr):
        net(x)  # not the patched one
    torch.testing.assert_close(net.kept, (0.9 + x.mean(0)))


class Listing(Keeping):
    """Holds its buffer in a list and under another name, too."""

    def __init__(self, change: Change, kept: Tensor) -> None:
        super().__init__(change, kept)
        self.listed, self.alias = [self.kept], self.kept


def in_place_in_a_list(net: Any, x: Tensor) -> None:
    net.listed[0].mul_(0.9).add_(x.mean(0))
    net.alias.add_(1)


@pytest.mark.parametrize("path", PATHS)
def test_a_buffer_that_is_held_elsewhere_is_the_same_there(path: str) -> None:
    found = []
    for run in (PATHS[path], in_place_of_all):
        torch.manual_seed(0)
        net = Listing(in_place_in_a_list, torch.ones(3))
        lslr, x, y = mpp.LSLR(net, STEPS), torch.randn(4, 3), torch.randn(4, 2)
        for _ in range(2):
            run(net, lslr, x, y).backward()
        assert net.listed[0] is net.kept
        assert net.alias is net.kept
        found.append([net.layer.weight.grad, lslr.rates.grad, net.kept])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
