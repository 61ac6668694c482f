"""One small problem in every loop of the package: what the tests compare, by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from mamlpp_ext.integrations import higher, torchopt

STEPS = 2
Problem = tuple[nn.Module, mpp.LSLR, tuple[Tensor, ...]]
Results = dict[str, list[Tensor] | str]


def problem() -> Problem:
    """A convolutional net with a row for each step, other numbers in every row; two tasks."""
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.1), nn.MaxPool2d(2)]
    plain = nn.Sequential(*conv, nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net = mpp.convert_batchnorm(plain.double(), STEPS)
    for norm in (net[1], net[6]):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    lslr = mpp.LSLR(net, STEPS)
    lslr.rates.data.uniform_(0.05, 0.5)
    images = [torch.randn(2, n, 1, 6, 6, dtype=torch.float64) for n in (5, 6)]
    labels = [torch.randint(2, (2, n)) for n in (5, 6)]
    return net, lslr, (images[0], labels[0], images[1], labels[1])


def losses_of(net: Any, step: Callable[[Tensor], Any], task: tuple[Tensor, ...]) -> Tensor:
    found = []
    for _ in mpp.inner_steps(net, STEPS):
        step(F.cross_entropy(net(task[0]), task[1]))
        found.append(F.cross_entropy(net(task[2]), task[3]))
    return torch.stack(found).mean()


def by_hand(net: nn.Module, lslr: mpp.LSLR, task: tuple[Tensor, ...], second_order: bool) -> Tensor:
    params: dict[str, Tensor] = dict(net.named_parameters())
    found = []
    for step in mpp.inner_steps(net, STEPS, second_order=second_order):
        loss = F.cross_entropy(functional_call(net, params, task[0]), task[1])
        wanted = [params[name] for name in lslr.names]
        grads = torch.autograd.grad(loss, wanted, create_graph=second_order)
        params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
        found.append(F.cross_entropy(functional_call(net, params, task[2]), task[3]))
    return torch.stack(found).mean()


def by_higher(net: nn.Module, lslr: mpp.LSLR, task: tuple[Tensor, ...], order: bool) -> Tensor:
    with higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
        return losses_of(fnet, diffopt.step, task)


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, task: tuple[Tensor, ...], order: bool) -> Tensor:
    with torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
        return losses_of(net, inner_opt.step, task)


def learned(loss: Tensor, net: nn.Module, lslr: mpp.LSLR) -> list[Tensor]:
    """The loss, its gradients, and the statistics that it left."""
    wanted = [*net.parameters(), lslr.rates]
    grads = torch.autograd.grad(loss, wanted)
    return [loss.detach(), *grads, *(b.clone() for b in net.buffers())]


class Counting(TorchFunctionMode):
    """Counts the calls of torch's functions by a user's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def seen_by_others(net: nn.Module, x: Tensor) -> list[Tensor]:
    """How many layers a hook on all modules sees, and convolutions a mode."""
    layers: list[str] = []
    handle = register_module_forward_hook(lambda layer, *_: layers.append(type(layer).__name__))
    with mpp.frozen_statistics(net):
        net(x)
        handle.remove()
        with Counting() as counting:
            net(x)
    return [torch.tensor([layers.count("Conv2d"), counting.names.count("conv2d")])]


def forward_mode(net: nn.Module, x: Tensor) -> list[Tensor]:
    with warnings.catch_warnings(), mpp.frozen_statistics(net):
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its first jvp
        return list(torch.func.jvp(net, (x,), (torch.ones_like(x),)))


def batched_gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    """By torch's older vmap, and a transform around the net."""
    with mpp.frozen_statistics(net):
        weight, output = net[0].weight, net(x)
        each = torch.eye(output.numel(), dtype=x.dtype).view(-1, *output.shape)
        jacobian = torch.autograd.grad(output, weight, each, is_grads_batched=True)
        by_func = torch.func.grad(lambda w: functional_call(net, {"0.weight": w}, x).square().sum())
        return [*jacobian, by_func(weight.detach())]


def refused(net: nn.Module, x: Tensor) -> list[Tensor]:
    """A norm that is checkpointed is called within a backward, after the loop."""
    for _ in mpp.inner_steps(net, STEPS):
        loss = checkpoint(net, x, use_reentrant=False).square().sum()
    try:
        loss.backward()
    except RuntimeError as error:
        return [torch.tensor("is called within a backward" in str(error))]
    return [torch.tensor(False)]


def conversion(net: nn.Module) -> list[Tensor]:
    """What is converted, counted and refused."""
    plain = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm1d(2), nn.Linear(2, 2))
    findings = mpp.check_setup(plain, None)
    converted = mpp.convert_batchnorm(plain, STEPS)
    plain[0].register_forward_hook(lambda *_: None)
    try:
        mpp.convert_batchnorm(plain, STEPS)
    except ValueError as error:
        hooked = "has hooks" in str(error)
    left = any("2 plain BatchNorm layers" in finding for finding in findings)
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(net.state_dict())
    return [torch.tensor([left, hooked]), *converted.parameters(), *loaded.parameters()]


def every_loop() -> Iterator[tuple[str, Callable[[Problem], list[Tensor]]]]:
    """Yields what to compute by name; each gets a problem of its own."""
    for order in (True, False):
        for name, loop in (("hand", by_hand), ("higher", by_higher), ("torchopt", by_torchopt)):

            def one_task(p: Problem, loop: Any = loop, order: bool = order) -> list[Tensor]:
                net, lslr, tasks = p
                return learned(loop(net, lslr, tuple(t[0] for t in tasks), order), net, lslr)

            yield f"{name}, {order}", one_task
        for settings in ({}, {"rematerialize": True}, {"chunk_size": 1}):

            def batch(p: Problem, settings: Any = settings, order: bool = order) -> list[Tensor]:
                net, lslr, tasks = p
                how = {"num_steps": STEPS, "second_order": order, **settings}
                result = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, **how)
                return learned(result.loss, net, lslr)

            yield f"task_batch_loss, {settings}, {order}", batch
    yield "seen by others", lambda p: seen_by_others(p[0], p[2][0][0])
    yield "forward mode", lambda p: forward_mode(p[0], p[2][0][0])
    yield "batched gradients", lambda p: batched_gradients(p[0], p[2][0][0])
    yield "checkpoint", lambda p: refused(p[0], p[2][0][0])
    yield "conversion", lambda p: conversion(p[0])


def results() -> Results:
    """Computes everything; where it is refused as not implemented, the message stands instead."""
    found: Results = {}
    for name, compute in every_loop():
        try:
            found[name] = [t.detach().clone() for t in compute(problem())]
        except NotImplementedError as error:
            found[name] = str(error)
    return found
