"""What a forward leaves behind in the model: there in turn, refused at once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

Forward = Callable[[Any, Tensor], Tensor]


class Probe:
    """An object that is called, and takes notes."""

    calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Keeping(nn.Module):
    """A layer whose forward is given, and what that may keep."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.inner, self.given = nn.ModuleDict({"layer": nn.Linear(3, 2)}), forward
        self.kept: Any = None
        self.calls, self.seen, self.several = 0, [0.0], {"mean": torch.zeros(2)}
        self.counter, self.probe, self.array = Counter(), Probe(), np.zeros(1)
        self.register_buffer("count", torch.zeros(()))

    def layer(self, x: Tensor) -> Tensor:
        return self.inner["layer"](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.layer(x)


def warmed_up(net: Any, x: Tensor) -> Tensor:
    """Goes by the number only later."""
    net.inner["layer"].calls = getattr(net.inner["layer"], "calls", 0) + 1
    return net.layer(x) if net.inner["layer"].calls < 100 else torch.tanh(net.layer(x))


def counted_in_a_buffer(net: Any, x: Tensor) -> Tensor:
    net.count.add_(1)
    return net.layer(x) * float(net.count)


def counted_by_data(net: Any, x: Tensor) -> Tensor:
    net.count.data += 1
    return net.layer(x)


def averaged(net: Any, x: Tensor) -> Tensor:
    net.several["mean"] = 0.9 * net.several["mean"] + 0.1 * x.detach().mean()
    return net.layer(x) - net.several["mean"]


def appended(net: Any, x: Tensor) -> Tensor:
    net.seen.append(1.0)
    return net.layer(x)


def set_by_the_first_task(net: Any, x: Tensor) -> Tensor:
    """As ActNorm does it."""
    if net.kept is None:
        net.kept = x.detach().std()
    return net.layer(x / net.kept)


class Counter:
    """An object that counts."""

    def __init__(self) -> None:
        self.calls, self.by = 0, {"all": [0]}


def counted_by_an_object(net: Any, x: Tensor) -> Tensor:
    net.counter.by["all"][0] += 1
    return net.layer(x)


def counted_by_an_array(net: Any, x: Tensor) -> Tensor:
    net.array += 1
    return net.layer(x) if net.array[0] < 100 else 2 * net.layer(x)


GOES_ON = {
    counted: "'calls'",
    warmed_up: "'inner.layer.calls'",
    counted_in_a_buffer: "'count'",
    counted_by_data: "'count'",
    averaged: "'several'",
    appended: "'seen'",
    counted_by_an_object: "'counter'",
    counted_by_an_array: "'array'",
}


def mask_made_once(net: Any, x: Tensor) -> Tensor:
    if net.kept is None:
        net.kept = torch.linspace(0.5, 1.5, x.shape[-1])
    return net.layer(x * net.kept)


def last_output(net: Any, x: Tensor) -> Tensor:
    net.kept = net.layer(x)
    net.several["output"] = [net.kept.detach()]
    net.shape = x.shape
    return torch.tanh(net.kept)


def last_noise(net: Any, x: Tensor) -> Tensor:
    net.kept = torch.randn(2)
    return net.layer(x)


def hooked_once(net: Any, x: Tensor) -> Tensor:
    """As transformers has its models keep hidden states."""
    if not net.kept:
        net.inner["layer"].register_forward_hook(lambda module, args, output: output.tanh())
        net.kept = True
    return net.layer(x)


def kept_deep(net: Any, x: Tensor) -> Tensor:
    net.counter.last = OrderedDict(output=[net.layer(x)])
    net.kept = {"deep": [{"output": net.layer(x)}]}
    return net.layer(x)


def counted_by_a_probe(net: Any, x: Tensor) -> Tensor:
    return net.layer(net.probe(x))


def targets_kept(net: Any, x: Tensor) -> Tensor:
    """What no trial sees."""
    if len(x) == 5:
        net.kept = net.layer(x)
    return net.layer(x)


HARMLESS = [
    hooked_once,
    kept_deep,
    counted_by_a_probe,
    targets_kept,
    set_by_the_first_task,
    mask_made_once,
    last_output,
    last_noise,
]


def learned(forward: Forward, **how: Any) -> tuple[Keeping, list[Tensor]]:
    """The loss and the gradients of two meta-batches of three tasks."""
    torch.manual_seed(0)
    net = Keeping(forward)
    lslr = mpp.LSLR(net, 2)
    for _ in range(2):
        batch = (
            torch.randn(3, 4, 3),
            torch.randn(3, 4, 2),
            torch.randn(3, 5, 3),
            torch.randn(3, 5, 2),
        )
        result = mpp.task_batch_loss(net, lslr, batch, F.mse_loss, num_steps=2, **how)
        result.loss.backward()
    return net, [result.loss.detach(), *(p.grad for p in net.parameters()), lslr.rates.grad]


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("forward", GOES_ON)
def test_what_goes_on_from_task_to_task_is_refused(
    forward: Forward, second_order: bool, unchanged: Any
) -> None:
    net = Keeping(forward)
    state = copy.deepcopy({k: v for k, v in vars(net).items() if not k.startswith("_")})
    batch = (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2
    said = f"leaves something behind in {GOES_ON[forward]}.*pass chunk_size=1"
    with unchanged(net), pytest.raises(RuntimeError, match=said):
        mpp.task_batch_loss(
            net, mpp.LSLR(net, 2), batch, F.mse_loss, num_steps=2, second_order=second_order
        )
    torch.testing.assert_close(
        *(
            {k: v for k, v in each.items() if k in ("kept", "calls", "seen", "several")}
            for each in (vars(net), state)
        )
    )
    assert "calls" not in vars(net.inner["layer"])


@pytest.mark.parametrize("forward", GOES_ON)
def test_rematerialised_it_is_as_in_turn(forward: Forward) -> None:
    found = [learned(forward, chunk_size=1, rematerialize=again) for again in (False, True)]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)
    assert [(net.calls, net.seen, net.count.item()) for net, _ in found] == [
        (found[0][0].calls, found[0][0].seen, found[0][0].count.item())
    ] * 2


UNTOUCHED = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "CSR": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3).float(), 0.1, 0, torch.qint8),
    "NaN": lambda: torch.full((3,), torch.nan),
    "list in itself": lambda: [made := [], made.append(made)][0],
}


def one_by_one_and_at_once(net: nn.Module, rematerialize: bool) -> None:
    batch = (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2
    for size in (1, None):
        how = {"num_steps": 2, "chunk_size": size, "rematerialize": rematerialize}
        mpp.task_batch_loss(net, mpp.LSLR(net, 2), batch, F.mse_loss, **how).loss.backward()


@pytest.mark.parametrize("rematerialize", [True, False])
@pytest.mark.parametrize("kind", UNTOUCHED)
@pytest.mark.filterwarnings("ignore")  # of torch, about prototypes
def test_what_cannot_be_compared_is_left_alone(kind: str, rematerialize: bool) -> None:
    def untouched(net: Any, x: Tensor) -> Tensor:
        return net.layer(x)

    net = Keeping(untouched)
    net.kept = UNTOUCHED[kind]()
    if kind == "sparse":
        net.register_buffer("adjacent", UNTOUCHED[kind]())
    one_by_one_and_at_once(net, rematerialize)


def test_inference_tensors_are_left_alone() -> None:
    net = Keeping(mask_made_once)
    with torch.inference_mode():
        net(torch.randn(4, 3))
    net.given = lambda net, x: net.layer(x)
    one_by_one_and_at_once(net, rematerialize=True)


def test_one_alone_is_not_tried() -> None:
    """Objects, and what the loss keeps: nobody could put it back."""
    net, calls = Keeping(counted_by_an_array), []

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return F.mse_loss(output, y)

    batch = (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2
    mpp.task_batch_loss(net, mpp.LSLR(net, 2), batch, loss_fn, num_steps=2, chunk_size=1)
    assert len(calls) == net.array[0] == 2 * 2 * 2  # tasks, steps, support and target


def test_a_buffer_in_two_places_is_one_when_a_step_is_run_again() -> None:
    def shared(net: Any, x: Tensor) -> Tensor:
        net.count += 1
        assert net.inner["layer"].count is net.count
        return net.layer(x) * net.inner["layer"].count.clone()

    found = []
    for again in (True, False):
        torch.manual_seed(0)
        net = Keeping(shared)
        net.inner["layer"].register_buffer("count", net.count)
        batch = (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2
        lslr = mpp.LSLR(net, 2)
        how = {"num_steps": 2, "chunk_size": 1, "rematerialize": again}
        mpp.task_batch_loss(net, lslr, batch, F.mse_loss, **how).loss.backward()
        found.append([lslr.rates.grad, net.count])
    torch.testing.assert_close(*found)


def test_what_a_forward_deletes_stays_away_when_a_step_is_run_again() -> None:
    def consumed(net: Any, x: Tensor) -> Tensor:
        vars(net).pop("seen", None)
        return net.layer(x)

    net, _ = learned(consumed, chunk_size=1, rematerialize=True)
    assert "seen" not in vars(net)


def test_in_turn_it_goes_on_as_in_plain_torch() -> None:
    """Three tasks of two steps, each with a support and a target forward, twice."""
    net, _ = learned(counted, chunk_size=1, all_step_losses=True)
    assert net.calls == 2 * 3 * 2 * 2
    net, _ = learned(counted, chunk_size=1, all_step_losses=True, rematerialize=True)
    assert net.calls == 2 * 3 * 2 * 2


@pytest.mark.parametrize("rematerialize", [True, False])
@pytest.mark.parametrize("forward", HARMLESS)
def test_what_no_task_goes_by_is_allowed(forward: Forward, rematerialize: bool) -> None:
    (net, at_once), (_, in_turn) = (
        learned(forward, chunk_size=size, rematerialize=rematerialize) for size in (None, 1)
    )
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)
    net(torch.randn(4, 3))  # nothing of a vmap's inside is left
    copy.deepcopy(net.several)
    if forward is not mask_made_once:
        fresh = Keeping(forward)
        assert (net.several.keys(), net.seen) == (
            {"mean", "output"} if forward is last_output else {"mean"},
            fresh.seen,
        )


def test_a_failure_within_leaves_nothing_behind() -> None:
    def fails(net: Any, x: Tensor) -> Tensor:
        net.kept = net.layer(x)
        net.failing = net.__dict__.get("failing", False)
        if net.failing:
            raise ValueError("by itself")
        return net.kept

    net, _ = learned(fails)
    net.failing, before = True, net.kept
    with pytest.raises(ValueError, match="by itself"):
        mpp.task_batch_loss(
            net, mpp.LSLR(net, 2), (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2,
            F.mse_loss, num_steps=2,
        )  # fmt: skip
    assert net.kept is before


def test_a_model_that_was_switched_is_tried_again() -> None:
    def switched(net: Any, x: Tensor) -> Tensor:
        return averaged(net, x) if net.switch else net.layer(x)

    net = Keeping(switched)
    net.switch = False
    batch = (torch.randn(2, 4, 3), torch.randn(2, 4, 2)) * 2
    lslr = mpp.LSLR(net, 2)
    mpp.task_batch_loss(net, lslr, batch, F.mse_loss, num_steps=2)
    net.switch = True
    with pytest.raises(RuntimeError, match="leaves something behind in 'several'"):
        mpp.task_batch_loss(net, lslr, batch, F.mse_loss, num_steps=2)
