"""The adapter for torchopt: chains, extract and recover, and a context with higher's manners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from conftest import nodes

torchopt = pytest.importorskip("torchopt")

from mamlpp_ext.integrations.torchopt import LSLRState, MetaLSLR, innerloop_ctx, lslr_transform

pytestmark = pytest.mark.usefixtures("float64")

Task = tuple[Tensor, ...]


def adapt(net: nn.Module, inner_opt: Any, task: Task, steps: int = 3) -> Tensor:
    """The inner loop as users of torchopt write it; returns the sum of the target losses."""
    losses = []
    for _ in mpp.inner_steps(net, steps):
        inner_opt.step(F.cross_entropy(net(task[0]), task[1]))
        losses.append(F.cross_entropy(net(task[2]), task[3]))
    return sum(losses)


def gradients(net: nn.Module, lslr: mpp.LSLR) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in [*net.named_parameters(), *lslr.named_parameters()]}


def expected_gradients(net: nn.Module, lslr: mpp.LSLR, task: Task, **ctx: Any) -> dict[str, Any]:
    net, lslr = copy.deepcopy((net, lslr))
    with innerloop_ctx(net, lslr, **ctx) as inner_opt:
        adapt(net, inner_opt, task).backward()
    return gradients(net, lslr)


def by_hand(
    net: nn.Module, lslr: mpp.LSLR, task: Task, max_norm: float, orders: tuple[bool, ...]
) -> Tensor:
    """Clipped inner steps with functional calls, names and torch.autograd.grad alone."""
    params, losses = dict(net.named_parameters()), []
    for step, second_order in enumerate(orders):
        with mpp.at_step(net, step):
            loss = F.cross_entropy(torch.func.functional_call(net, params, (task[0],)), task[1])
            grads = torch.autograd.grad(
                loss, list(params.values()), create_graph=second_order, retain_graph=True
            )
            total = torch.stack([grad.detach().norm() for grad in grads]).norm()
            scale = min(1.0, max_norm / (total.item() + 1e-6))
            updated = dict(params)
            for (name, p), grad in zip(params.items(), grads, strict=True):
                if name in lslr.names:
                    rate = lslr.rates[lslr.names.index(name), step]
                    updated[name] = p - rate * (grad * scale)
            params = updated
            loss = F.cross_entropy(torch.func.functional_call(net, params, (task[2],)), task[3])
            losses.append(loss)
    return sum(losses)


@pytest.mark.parametrize("max_norm", [0.1, 1e9], ids=["clipped", "not clipped"])
def test_chain_after_clipping(net: nn.Module, lslr: mpp.LSLR, task: Task, max_norm: float) -> None:
    """torchopt flattens bias before weight: rates paired by position would be wrong here."""
    twin, table = copy.deepcopy((net, lslr))
    by_hand(twin, table, task, max_norm, (True,) * 3).backward()
    chain = torchopt.chain(torchopt.clip.clip_grad_norm(max_norm), lslr_transform(lslr))
    inner_opt = torchopt.MetaOptimizer(net, chain)
    weights = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    adapt(net, inner_opt, task).backward()
    torchopt.recover_state_dict(net, weights)
    torch.testing.assert_close(gradients(net, lslr), gradients(twin, table))


def test_chain_with_a_copied_model_and_table(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    expected = expected_gradients(net, lslr, task)
    net, lslr = copy.deepcopy((net, lslr))  # together, so that they stay a pair
    weights = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    adapt(net, torchopt.MetaOptimizer(net, lslr_transform(lslr)), task).backward()
    torchopt.recover_state_dict(net, weights)
    torch.testing.assert_close(gradients(net, lslr), expected)


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_extract_and_recover(
    net: nn.Module, lslr: mpp.LSLR, task: Task, second_order: bool
) -> None:
    """The loop of torchopt's own MAML examples: one optimizer, rewound for every task."""
    twin, table = copy.deepcopy((net, lslr))
    for _ in range(2):
        with innerloop_ctx(twin, table, second_order=second_order) as inner_opt:
            adapt(twin, inner_opt, task).backward()
    inner_opt = MetaLSLR(net, lslr, second_order=second_order)
    weights = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    state = torchopt.extract_state_dict(inner_opt, by="reference")
    for _ in range(2):
        adapt(net, inner_opt, task).backward()
        torchopt.recover_state_dict(net, weights)
        torchopt.recover_state_dict(inner_opt, state)
    torch.testing.assert_close(gradients(net, lslr), gradients(twin, table))
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_the_step_count_travels_in_the_state(
    net: nn.Module, lslr: mpp.LSLR, task: Task, by: str
) -> None:
    inner_opt = MetaLSLR(net, lslr)
    inner_opt.step(F.cross_entropy(net(task[0]), task[1]))
    (state,) = kept = torchopt.extract_state_dict(inner_opt, by=by)
    assert isinstance(state, LSLRState)
    assert state.step == 1
    for _ in range(2):
        inner_opt.step(F.cross_entropy(net(task[0]), task[1]))
    assert inner_opt.state_dict()[0].step == 3
    torchopt.recover_state_dict(inner_opt, kept)
    before = dict(net.named_parameters())
    loss = F.cross_entropy(net(task[0]), task[1])
    grads = torch.autograd.grad(loss, list(before.values()), retain_graph=True)
    inner_opt.step(loss)
    expected = lslr.update(before, dict(zip(before, grads, strict=True)), 1)  # column 1 again
    torch.testing.assert_close(dict(net.named_parameters()), expected)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "per-step"])
@pytest.mark.parametrize(
    ("kept", "count"),
    [
        ({"by": "reference", "with_buffers": False}, 6),
        ({"by": "copy", "with_buffers": True}, 0),  # torchopt takes them back
        ({"by": "reference", "detach_buffers": True}, 0),  # as its own examples do
    ],
    ids=["without", "copied", "detached"],
)
def test_statistics_with_and_without_buffers(
    net: nn.Module, task: Task, plain: bool, kept: dict[str, Any], count: int
) -> None:
    if plain:
        net.norm = nn.BatchNorm1d(4)
    lslr, before = mpp.LSLR(net, 3), net.norm.running_mean.clone()
    state = torchopt.extract_state_dict(net, **kept)
    adapt(net, MetaLSLR(net, lslr), task)
    torchopt.recover_state_dict(net, state)
    assert net.norm.num_batches_tracked.sum() == count
    assert torch.equal(net.norm.running_mean, before) == (count == 0)


def test_statistics_are_those_of_the_forwards(net: nn.Module, task: Task) -> None:
    lslr, twin = mpp.LSLR(net, 3, lr=0.0), copy.deepcopy(net)
    with innerloop_ctx(net, lslr) as inner_opt:
        adapt(net, inner_opt, task)
    for _ in mpp.inner_steps(twin, 3):
        twin(task[0])
        twin(task[2])
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_functional_style(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    """A dict by name through init, update and apply_updates, without a MetaOptimizer."""
    expected = expected_gradients(net, lslr, task)
    transform, params = lslr_transform(lslr), dict(net.named_parameters())
    state, losses = transform.init(params), []
    for _ in mpp.inner_steps(net, 3):
        loss = F.cross_entropy(torch.func.functional_call(net, params, (task[0],)), task[1])
        found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        grads = dict(zip(params, found, strict=True))
        before = {name: grad.clone() for name, grad in grads.items()}
        updates, state = transform.update(grads, state, params=params, inplace=False)
        assert {name for name, update in updates.items() if update is None} == {
            "norm.weight",
            "norm.bias",
        }
        torch.testing.assert_close(grads, before)
        params = torchopt.apply_updates(params, updates, inplace=False)
        logits = torch.func.functional_call(net, params, (task[2],))
        losses.append(F.cross_entropy(logits, task[3]))
    assert state.step == 3
    sum(losses).backward()
    torch.testing.assert_close(gradients(net, lslr), expected)


def test_functional_style_of_the_adapted_alone(net: nn.Module, lslr: mpp.LSLR) -> None:
    transform = lslr_transform(lslr)
    params = {name: net.get_parameter(name) for name in reversed(lslr.names)}  # in any order
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    updates, _ = transform.update(grads, transform.init(params), params=params, inplace=False)
    for j, name in enumerate(lslr.names):
        torch.testing.assert_close(updates[name], -lslr.rates[j, 0] * grads[name])


def test_missing_gradient_is_no_update(net: nn.Module, lslr: mpp.LSLR) -> None:
    transform, params = lslr_transform(lslr), dict(net.named_parameters())
    grads = {**{name: torch.ones_like(p) for name, p in params.items()}, "head.bias": None}
    updates, _ = transform.update(grads, transform.init(params), params=params)
    assert updates["head.bias"] is None
    assert updates["head.weight"] is not None


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_tied_parameters_are_adapted_in_both_places(task: Task) -> None:
    net = Tied()
    lslr = mpp.LSLR(net, 2)
    assert lslr.names == ("first.weight", "first.bias", "second.bias")
    weight = net.first.weight
    loss = F.cross_entropy(net(task[0]), task[1])
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    with innerloop_ctx(net, lslr) as inner_opt:
        inner_opt.step(loss)
        assert net.first.weight is net.second.weight
        torch.testing.assert_close(net.first.weight, weight - lslr.rates[0, 0] * grad)
        F.cross_entropy(net(task[2]), task[3]).backward()
    assert net.first.weight is net.second.weight is weight


@pytest.mark.parametrize("orders", [(False, True, False), (True, False, True), (False,) * 3])
def test_order_may_change_between_steps(
    net: nn.Module, lslr: mpp.LSLR, task: Task, orders: tuple[bool, ...]
) -> None:
    twin, table = copy.deepcopy((net, lslr))
    by_hand(twin, table, task, 1e9, orders).backward()
    losses = []
    with innerloop_ctx(net, lslr) as inner_opt:
        for step in mpp.inner_steps(net, 3):
            inner_opt.second_order = orders[step]
            inner_opt.step(F.cross_entropy(net(task[0]), task[1]))
            losses.append(F.cross_entropy(net(task[2]), task[3]))
        sum(losses).backward()
    torch.testing.assert_close(gradients(net, lslr), gradients(twin, table))


def test_first_order_builds_no_second_derivative_graph(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    sizes = {}
    for second_order in (True, False):
        with innerloop_ctx(net, lslr, second_order=second_order) as inner_opt:
            sizes[second_order] = nodes(adapt(net, inner_opt, task))
    assert sizes[False] < sizes[True] / 2


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_meta_gradient_reaches_weights_rows_and_rates(
    net: nn.Module, lslr: mpp.LSLR, task: Task, second_order: bool
) -> None:
    for name, grad in expected_gradients(net, lslr, task, second_order=second_order).items():
        assert grad is not None, name
        assert grad.count_nonzero() > 0, name


def test_weights_are_the_meta_parameters_again(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any
) -> None:
    with mpp.at_step(net, 1), unchanged(net), mpp.frozen_statistics(net):
        with innerloop_ctx(net, lslr) as inner_opt:
            adapt(net, inner_opt, task)
            assert not isinstance(net.head.weight, nn.Parameter)  # net itself adapts
            assert isinstance(net.norm.weight, nn.Parameter)
        assert net.norm.inner_step.index == 1


def test_backward_after_the_context(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    expected = expected_gradients(net, lslr, task)
    with innerloop_ctx(net, lslr) as inner_opt:
        loss = adapt(net, inner_opt, task)
    loss.backward()
    torch.testing.assert_close(gradients(net, lslr), expected)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "per-step"])
def test_an_exception_leaves_the_model_alone(
    net: nn.Module, task: Task, unchanged: Any, plain: bool
) -> None:
    if plain:
        net.norm = nn.BatchNorm1d(4)
    lslr = mpp.LSLR(net, 3)
    with unchanged(net), unchanged(lslr), pytest.raises(ZeroDivisionError):
        with innerloop_ctx(net, lslr) as inner_opt:
            adapt(net, inner_opt, task) / (1 // 0)


def test_a_step_too_many_leaves_the_weights(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    with innerloop_ctx(net, lslr) as inner_opt:
        adapt(net, inner_opt, task)
        before, loss = dict(net.named_parameters()), F.cross_entropy(net(task[0]), task[1])
        with pytest.raises(ValueError, match="inner step 3 is out of range for LSLR"):
            inner_opt.step(loss)
        assert [*map(id, net.parameters())] == [*map(id, before.values())]
        assert inner_opt.state_dict()[0].step == 3


def test_parameters_without_gradient_stay(net: nn.Module, task: Task) -> None:
    net.spare = nn.Identity()
    net.spare.weight = nn.Parameter(torch.ones(2))
    net.body.bias.requires_grad_(False)
    lslr = mpp.LSLR(net, 3)
    with innerloop_ctx(net, lslr) as inner_opt:
        adapt(net, inner_opt, task).backward()
        assert net.spare.weight.tolist() == [1, 1]
    assert net.body.bias.grad is None
    rates = lslr.rates.grad
    assert rates[lslr.names.index("spare.weight")].count_nonzero() == 0
    assert rates[lslr.names.index("head.weight")].count_nonzero() == 3


class Averaging(nn.Module):
    """Puts a new buffer in the place of the old one in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("average", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        output = self.layer(input)
        self.average = 0.9 * self.average + 0.1 * output.detach().mean(0)
        return output


def test_an_exception_puts_back_a_buffer_that_was_replaced() -> None:
    net = Averaging()
    before = net.average

    def fail() -> None:
        with innerloop_ctx(net, mpp.LSLR(net, 2)):
            net(torch.ones(4, 3))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert net.average is before
    assert not before.any()
