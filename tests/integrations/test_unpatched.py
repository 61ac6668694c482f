"""Patched models that go by weights of the model itself: refused in higher, right elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytest.importorskip("higher")

from mamlpp_ext.integrations import higher as mpp_higher


@dataclass
class Output:
    """What some models return."""

    loss: Tensor
    more: Any = None


class Held:
    """An object that holds a layer, and is none."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer


class Both(nn.Module):
    """Calls its head, and also in another way."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.held, self.other, self.calls = Held(self.head), other, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        hidden = torch.tanh(self.body(x))
        return self.other(self.held, hidden, self.head(hidden), self.calls)


OTHERS = {
    "called": lambda held, h, y, calls: y + held.layer(h),
    "read": lambda held, h, y, calls: y + F.linear(h, held.layer.weight),
    "called by its forward": lambda held, h, y, calls: y * held.layer.forward(h),
    "in the second step alone": lambda held, h, y, calls: y + held.layer(h) if calls == 2 else y,
    "in a dictionary": lambda held, h, y, calls: {"y": y, "z": [held.layer(h)]},
    "in a dataclass": lambda held, h, y, calls: Output(y, (held.layer(h),)),
}


def predicted(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["y"] + output["z"][0]
    return output.loss + output.more[0] if isinstance(output, Output) else output


def three_steps(net: nn.Module, x: Tensor, **modes: bool) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3), **modes) as (fnet, diffopt):
        for _ in range(3):
            diffopt.step(predicted(fnet(x)).square().mean())


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_weights_of_the_model_itself_in_a_patched_forward(
    other: str, tracks: bool, second_order: bool
) -> None:
    net, x = Both(OTHERS[other]), torch.randn(5, 3)
    before = [p.clone() for p in net.parameters()]
    modes = {"second_order": second_order, "track_higher_grads": tracks}
    said = "output of the patched model depends on .*'head.weight'.*are for mamlpp_ext.integrations"
    with pytest.raises(RuntimeError, match=said):
        three_steps(net, x, **modes)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert net.calls == 0


class Parts(nn.Module):
    """Is called part by part; a part calls its own layer, and what an object holds of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(3, 4), Both(OTHERS["called"])
        self.part.body = nn.Linear(4, 4)


@pytest.mark.parametrize("second_order", [True, False])
def test_a_part_that_is_called_by_itself_is_looked_at(second_order: bool) -> None:
    net, x = Parts(), torch.randn(5, 3)
    said = "output of the patched model depends on .*'part.head.weight'"
    with (
        pytest.raises(RuntimeError, match=said),
        mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 2), second_order=second_order) as (fnet, opt),
    ):
        opt.step(fnet.part(fnet.body(x)).square().mean())
    assert net.part.calls == 0


def test_parts_called_by_themselves_may_follow_each_other() -> None:
    net, x = Parts(), torch.randn(5, 3)
    net.part.other = lambda held, h, y, calls: y
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 2)) as (fnet, diffopt):
        for _ in range(2):
            diffopt.step(fnet.part(fnet.body(x)).square().mean())
        fnet.part(fnet.body(x)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_terms_and_inputs_outside_of_the_model_may() -> None:
    """A proximal term, and inputs that another part of the model made."""
    torch.manual_seed(0)
    net = Both(lambda held, h, y, calls: y)
    lslr, x = mpp.LSLR(net, 2, 0.1), torch.randn(5, 3)
    with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
        for _ in range(2):
            near = sum((p - own).square().sum() for p, own in zip(
                fnet.parameters(), net.parameters(), strict=True
            ))  # fmt: skip
            made = x + net.body(x)[:, :3]
            diffopt.step(fnet(made).square().mean() + near)
        fnet(x).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_what_a_model_keeps_of_the_step_before_may() -> None:
    """Its graph goes back to the initial weights, by the adapted ones."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.before = nn.Linear(3, 3), torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.before = self.layer(x).mean(0) + 0.5 * self.before
            return self.before

    net = Remembers()
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 2)) as (fnet, diffopt):
        for _ in range(2):
            diffopt.step(fnet(torch.ones(2, 3)).square().sum())
        fnet(torch.ones(2, 3)).sum().backward()
    assert net.before.requires_grad


class Given(nn.Module):
    """Goes by a prototype that it was given, and by more inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prototype = nn.Linear(3, 3), torch.zeros(3)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        given = sum((m.loss if isinstance(m, Output) else m).sum() for m in more)
        return self.layer(x) + self.prototype + given


def test_what_the_model_was_given_may() -> None:
    net, x = Given(), torch.ones(2, 3)
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 2)) as (fnet, diffopt):
        fnet.prototype = net(x).mean(0)
        for _ in range(2):
            more = net.layer.weight, 2 * net.layer.weight, Output(net(x))
            diffopt.step(fnet(x, *more).square().sum())


def test_outputs_that_go_on_for_ever_are_looked_through() -> None:
    net = Both(lambda held, h, y, calls: Output(y))
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 2)) as (fnet, diffopt):
        output = fnet(torch.ones(2, 3))
        output.more = [output]
        diffopt.step(output.loss.sum())
