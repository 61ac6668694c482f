"""Plain attributes through the adapters: what a forward assigns is there, as in plain torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

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

Change = Callable[[Any, Tensor], None]


class Keeping(nn.Module):
    """A model that scales by what it keeps in plain attributes, and changes that in its own way."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.body, self.head, self.change = nn.Linear(3, 4), nn.Linear(4, 2), change
        self.calls, self.mean, self.last = 0, torch.zeros(3), None
        self.way = [self.body, "calls", 0]
        self.notes = {"head": self.head, "calls": 0}
        self.seen = {self.head}
        self.path: list[Any] = []
        self.gone = 1

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x.detach())
        hidden = self.way[0](x * (1 + self.mean)) * (1 + 0.1 * self.calls + 0.1 * len(self.path))
        return self.notes["head"](torch.tanh(hidden)) * (
            1 + 0.1 * self.way[2] + 0.1 * self.notes["calls"]
        )


def counted(net: Any, x: Tensor) -> None:
    net.calls += 1


def averaged(net: Any, x: Tensor) -> None:
    net.mean = 0.9 * net.mean + 0.1 * x.mean(0)


def kept_with_its_graph(net: Any, x: Tensor) -> None:
    net.last = net.body(x)


def appended(net: Any, x: Tensor) -> None:
    net.path.append(x.mean().item())


def counted_beside_a_layer(net: Any, x: Tensor) -> None:
    net.way[2] += 1
    net.notes["calls"] += 1
    net.notes["mean"] = x.mean()


def grown_beside_a_layer(net: Any, x: Tensor) -> None:
    net.way.append(x.mean())
    net.seen |= {net.body}


def layers_assigned(net: Any, x: Tensor) -> None:
    net.last = (net.body, net.head.forward)


def made(net: Any, x: Tensor) -> None:
    net.new = getattr(net, "new", 0) + 1


def deleted(net: Any, x: Tensor) -> None:
    if hasattr(net, "gone"):
        del net.gone


def of_a_layer(net: Any, x: Tensor) -> None:
    net.head.calls = getattr(net.head, "calls", 0) + 1


CHANGES = {change.__name__: change for change in (
    counted, averaged, kept_with_its_graph, appended, counted_beside_a_layer, grown_beside_a_layer,
    layers_assigned, made, deleted, of_a_layer,
)}  # fmt: skip


def problem(case: str) -> tuple[Keeping, mpp.LSLR, list[Tensor]]:
    torch.manual_seed(0)
    net = Keeping(CHANGES[case])
    return net, mpp.LSLR(net, STEPS), [torch.randn(4, 3), torch.randn(4, 2)]


def kept(net: Any) -> list[Any]:
    """What can be compared of the plain attributes; layers by what they are called."""
    names = {id(layer): name for name, layer in net.named_modules()}

    def plain(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return names[id(value)]  # a twin has no name here
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if isinstance(value, set):
            return sorted(plain(each) for each in value)
        if isinstance(value, dict):
            return [(plain(key), plain(each)) for key, each in value.items()]
        if isinstance(value, Tensor):
            return value.detach().numpy().round(9).tolist()
        return plain(value.__self__) if hasattr(value, "__self__") else value

    ours = vars(net).keys() - vars(nn.Module()).keys() - {"change"}
    return [(name, plain(vars(net)[name])) for name in sorted(ours)] + [
        getattr(net.head, "calls", None)
    ]


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("path", [in_higher, in_torchopt])
def test_attributes_are_there_afterwards_as_in_plain_torch(case: str, path: Any) -> None:
    found, states = [], []
    for run in (path, in_place_of_all):
        net, lslr, (x, y) = problem(case)
        objects = net.way, net.notes, net.seen
        for _ in range(2):  # two tasks in turn: the second begins with what the first left
            run(net, lslr, x, y).backward()
        kept_objects = net.way, net.notes, net.seen
        assert all(a is b for a, b in zip(kept_objects, objects, strict=True))
        found.append([*(p.grad for p in net.parameters()), lslr.rates.grad])
        states.append(kept(net))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert states[0] == states[1]


@pytest.mark.parametrize("case", sorted(CHANGES.keys() - {"appended"}))  # a list is shared
def test_after_a_failure_or_in_test_mode_they_are_as_before(case: str) -> None:
    net, lslr, (x, y) = problem(case)
    before = kept(net)
    with pytest.raises(ValueError, match="inner step 2"):
        in_higher(net, lslr, x, y, STEPS + 1)
    assert kept(net) == before
    with mpp_higher.innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
        diffopt.step(F.mse_loss(fnet(x), y))
    assert kept(net) == before


def test_recurrent_layers_keep_their_own_weights() -> None:
    net: Any = nn.LSTM(3, 4)
    lslr, own = mpp.LSLR(net, 1), list(net._flat_weights)
    with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
        diffopt.step(fnet(torch.randn(2, 5, 3))[0].sum())
    assert all(a is b for a, b in zip(net._flat_weights, own, strict=True))


class Box:
    """An object that holds a model."""

    def __init__(self, net: Any) -> None:
        self.net = net


def boxed(net: Any, x: Tensor) -> None:
    net.last = net.last or Box(net)


def in_a_deque(net: Any, x: Tensor) -> None:
    net.last = net.last or deque([net.head])


@pytest.mark.parametrize("change", [boxed, in_a_deque])
def test_what_may_refer_to_the_patched_model_stays_with_it(change: Change) -> None:
    net = Keeping(change)
    lslr, x = mpp.LSLR(net, 1), torch.randn(4, 3)
    before = net(x)
    net.last = None
    for _ in range(2):
        with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
            diffopt.step(fnet(x).sum())
        assert net.last is None
    torch.testing.assert_close(net(x), before)


def test_a_flag_ends_with_the_hooks_that_it_speaks_of() -> None:
    def hooked(net: Any, x: Tensor) -> None:
        if not net.calls:
            net.head.register_forward_hook(lambda module, args, output: output.tanh())
            net.calls = True

    found = []
    for run in (in_higher, in_place_of_all):
        torch.manual_seed(0)
        net = Keeping(hooked)
        net.calls = False
        lslr, x, y = mpp.LSLR(net, STEPS), torch.randn(4, 3), torch.randn(4, 2)
        losses = [run(net, lslr, x, y) for _ in range(2)]
        found.append([loss.detach() for loss in losses])
        assert net.calls == (run is in_place_of_all)
    torch.testing.assert_close(*found)


def test_what_the_user_does_to_the_models_own_meanwhile_stays() -> None:
    net = Keeping(CHANGES["counted"])
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 1)) as (fnet, diffopt):
        diffopt.step(fnet(torch.randn(4, 3)).sum())
        net.way.append("mine")
    assert net.way[-1] == "mine"


def test_a_parameter_that_a_forward_makes_is_registered() -> None:
    def makes(net: Any, x: Tensor) -> None:
        net.scale = nn.Parameter(torch.ones(()))

    net = Keeping(makes)
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 1)) as (fnet, diffopt):
        diffopt.step(fnet(torch.randn(2, 3)).sum())
    assert "scale" in dict(net.named_parameters())
