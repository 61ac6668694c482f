"""A forward means inside our contexts what it means in plain torch: values, derivatives, layouts.

On random forwards with views, writes, hooks, modes and functions of their own. ``make test-deep``
tries 2,000 of them.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

import mamlpp_ext as mpp
from mamlpp_ext.norm import run
from random_forwards import (
    FIRST_ORDER_ALONE,
    OPS,
    STEPS,
    TASKS,
    Forward,
    Log,
    forwards,
    hooked,
    make,
    tasks,
    torchs,
)

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")
THRESHOLDS = ("_LEAST_FIRST_ORDER", "_LEAST_SECOND_ORDER", "_LEAST_AS_ONE")
DEEP = 2 * int(os.environ.get("EXAMPLES", "0"))
Task = tuple[Tensor, ...]


def in_loop(net: nn.Module, step: Callable[[Tensor], Any], task: Task) -> list[Tensor]:
    losses = []
    for _ in mpp.inner_steps(net, STEPS):
        step(F.cross_entropy(net(task[0]), task[1]))
        losses.append(F.cross_entropy(net(task[2]), task[3]))
    return losses


def by_higher(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    with mpp_higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
        return in_loop(fnet, diffopt.step, task)


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    with mpp_torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
        return in_loop(net, inner_opt.step, task)


def by_hand(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    params, losses = dict(net.named_parameters()), []
    for step in mpp.inner_steps(net, STEPS):
        loss = F.cross_entropy(functional_call(net, params, task[:1]), task[1])
        wanted = [name for name in lslr.names if params[name].requires_grad]
        found = torch.autograd.grad(
            loss, [params[name] for name in wanted], create_graph=order, allow_unused=True
        )
        grads = {**dict.fromkeys(lslr.names), **dict(zip(wanted, found, strict=True))}
        params = lslr.update(params, grads, step)
        losses.append(F.cross_entropy(functional_call(net, params, task[2:3]), task[3]))
    return losses


LOOPS = {"higher": by_higher, "torchopt": by_torchopt, "by hand": by_hand, "torch": by_hand}
REFERENCES = ("torch", "by vmap")  # with torch's own layers
BATCHES: dict[str, dict[str, Any]] = {
    "task_batch": {},
    "rematerialised": {"rematerialize": True},
    "one by one": {"chunk_size": 1},
}


def by_vmap(net: nn.Module, lslr: mpp.LSLR, batch: Task, order: bool) -> Tensor:
    """All tasks at once by torch's vmap around the forward, statistics left alone."""
    outer = {name: p for name, p in net.named_parameters() if name not in lslr.names}
    params = {name: p.expand(TASKS, *p.shape) for name, p in lslr.parameters_of(net).items()}
    dims = ({**dict.fromkeys(params, 0), **dict.fromkeys(outer)}, 0, 0)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    losses = []
    with mpp.frozen_statistics(net):
        for step in mpp.inner_steps(net, STEPS):
            support = vmap(loss, dims)({**params, **outer}, *batch[:2]).sum()
            wanted = [name for name in params if dict(net.named_parameters())[name].requires_grad]
            found = torch.autograd.grad(
                support, [params[name] for name in wanted], create_graph=order, allow_unused=True
            )
            grads = {**dict.fromkeys(params), **dict(zip(wanted, found, strict=True))}
            params = lslr.update(params, grads, step)
            losses.append(vmap(loss, dims)({**params, **outer}, *batch[2:]))
    return torch.stack(losses).mean()


def meta_loss(path: str, net: nn.Module, lslr: mpp.LSLR, batch: Task, order: bool) -> Tensor:
    """Returns the mean over tasks and steps, with a graph."""
    if path == "by vmap":
        return by_vmap(net, lslr, batch, order)
    if path in LOOPS:
        found = [LOOPS[path](net, lslr, task, order) for task in zip(*batch, strict=True)]
        return torch.stack([torch.stack(losses) for losses in found]).mean()
    result = mpp.task_batch_loss(
        net,
        lslr,
        batch,
        F.cross_entropy,
        num_steps=STEPS,
        second_order=order,
        aggregate=lambda losses: losses.mean(-1),
        **BATCHES[path],
    )
    return result.loss


def outcome(path: str, plan: Forward, second_order: bool) -> tuple[list[dict[str, Any]], Log]:
    """Returns loss, gradients and statistics of some iterations, and what the forward saw."""
    net, lslr = make(plan)
    if path in REFERENCES:
        torchs(net)
    frozen = next(layer for layer in net.stages[0].modules() if isinstance(layer, nn.Conv2d))
    handles, batch, found = hooked(net), tasks(plan), []
    for iteration in range(3 if plan.frozen else 1):
        frozen.weight.requires_grad_(iteration != 1)
        net.zero_grad()
        lslr.zero_grad()
        loss = meta_loss(path, net, lslr, batch, second_order)
        loss.backward()
        named = {**dict(net.named_parameters()), "rates": lslr.rates}
        found.append({"loss": loss.detach(), **{n: p.grad for n, p in named.items()}})
    for handle in handles:
        handle.remove()
    return copy.deepcopy([*found, dict(net.named_buffers())]), net.log.entries


def assert_equal(found: Any, expected: Any) -> None:
    for ours, torchs_ in zip(found, expected, strict=True):
        assert ours.keys() == torchs_.keys()
        for name, want in torchs_.items():
            got = ours[name]
            if want is None or got is None:
                assert all(t is None or not t.count_nonzero() for t in (got, want)), name
                continue
            scale = 1 + float(want.double().abs().max())
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * scale, msg=name)


def assert_as_in_torch(path: str, plan: Forward, second_order: bool, expected: Any) -> None:
    """Values are those of each task alone, or vmap's are not and that was said; layouts torch's."""
    at_once = path in ("task_batch", "rematerialised")
    try:
        found, ours = outcome(path, plan, second_order)
    except RuntimeError as error:
        if not at_once or "pass chunk_size=1" not in str(error):
            raise
        assert not vmap_agrees(plan, second_order, expected[0])
        return
    assert_equal(found, expected[0])
    log = outcome("by vmap", plan, second_order)[1] if at_once else expected[1]
    if path == "rematerialised":  # calls some forwards again
        assert [entry for entry in ours[-len(log) :] if entry not in log] == []
    else:  # a batch of tasks tries a step before
        assert ours[-len(log) :] == log


def vmap_agrees(plan: Forward, second_order: bool, expected: Any) -> bool:
    """Returns whether torch's vmap computes with torch's layers what each task has alone."""
    try:
        found, _ = outcome("by vmap", plan, second_order)
        assert_equal(found[:-1], expected[:-1])
    except (RuntimeError, AssertionError):
        return False
    return True


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # some of vmap's rules
@settings(max_examples=DEEP or 100)
@given(st.data(), st.sampled_from([*list(LOOPS)[:3], *BATCHES]), st.booleans())
def test_a_forward_means_what_it_means_in_torch(data, path, second_order) -> None:
    names = [name for name in OPS if not (second_order and name in FIRST_ORDER_ALONE)]
    plan = data.draw(forwards(names))
    if path == "higher":
        plan = dataclasses.replace(plan, hook=None)  # it drops them, with or without us
    event(f"{path}, {'second' if second_order else 'first'} order")
    try:
        expected = outcome("torch", plan, second_order)
    except RuntimeError:  # torch refuses it, too: a write to what a backward needs, a view
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        for name, least in zip(THRESHOLDS, plan.least, strict=True):
            patch.setattr(run, name, least)
        assert_as_in_torch(path, plan, second_order, expected)
