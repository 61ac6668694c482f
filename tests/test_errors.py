"""Every bad input ends in a built-in exception that helps, and changes nothing.

A message names what it got, what is legal, and what to do about it: the words of each row.
"""

from __future__ import annotations

import copy
import math
import os
import runpy
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from mamlpp_ext import __main__ as command
from mamlpp_ext import cuda_graph, gather
from mamlpp_ext.benchmark import measure
from mamlpp_ext.benchmark.question import Question, check_logits

higher = pytest.importorskip("higher")
torchopt = pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")

Net = nn.Module


def plain() -> nn.Module:
    """A model that convert_batchnorm takes."""
    layers = {"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(layers))


def per_step() -> nn.Module:
    """A model of three rows; what most rows of the table are about."""
    net = mpp.convert_batchnorm(plain(), 3)
    net.norm.running_mean.fill_(1.0)  # zeros would hide that a failure scaled them
    return net


def frozen() -> nn.Module:
    """A model that nothing can be adapted of."""
    return plain().requires_grad_(False)


def without_gpu(net: nn.Module) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        Question("module:model", (3,), device="cuda")


def graphed(net: Net, **settings: Any) -> mpp.TaskBatchLoss:
    return mpp.TaskBatchLoss(
        net, mpp.LSLR(net, 5), F.cross_entropy, num_steps=5, cuda_graph=True, **settings
    )


def wait_for_the_gpu(net: Net) -> None:
    """As a warm-up does where the model or the loss asks for a number."""

    def run() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    with (
        mock.patch.object(torch.cuda, "get_sync_debug_mode", return_value=0),
        mock.patch.object(torch.cuda, "set_sync_debug_mode") as chosen,
    ):
        try:
            cuda_graph._run_without_waiting(run)
        finally:
            assert [call.args for call in chosen.mock_calls] == [("error",), (0,)]


def with_layer(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict({"norm": nn.BatchNorm1d(4), "odd": layer()}))


def hooked() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.register_forward_hook(lambda *args: None)
    return layer


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def batch(tasks: int = 2, support: int = 4, target: int = 5) -> list[Tensor]:
    sizes = ((tasks, support), (tasks, target))
    return [
        t for size in sizes for t in (torch.randn(*size, 3), torch.zeros(size, dtype=torch.long))
    ]


def run(net: Net, *, data: Any = None, loss: Any = F.cross_entropy, **settings: Any) -> Any:
    lslr = settings.pop("lslr", None) or mpp.LSLR(net, 3)
    settings = {"num_steps": 3, **settings}
    return mpp.task_batch_loss(net, lslr, batch() if data is None else data, loss, **settings)


def forward_at(net: Net, step: int) -> None:
    with mpp.at_step(net, step):
        net(torch.randn(4, 3))


def update(
    net: Net, step: Any = 0, without_param: str = "", without_grad: str = "", **other: Tensor
) -> None:
    tensors = dict(net.named_parameters())
    params = {name: p for name, p in tensors.items() if name != without_param}
    grads = {name: p for name, p in tensors.items() if name != without_grad}
    mpp.LSLR(net, 3).update(params, grads | other, step)


def inside_higher(net: Net, use: Callable[[Net], Any], **settings: Any) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, diffopt):
        diffopt.step(fnet(torch.randn(4, 3)).sum(), **settings)
        use(fnet)


def inside_torchopt(net: Net, use: Callable[[Net], Any]) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        inner_opt.step(net(torch.randn(4, 3)).sum())
        use(net)


def enter_higher(net: Net, lslr: mpp.LSLR | None = None, **settings: Any) -> None:
    with mpp_higher.innerloop_ctx(net, lslr or mpp.LSLR(per_step(), 3), **settings):
        pass


def enter_torchopt(net: Net, lslr: mpp.LSLR | None = None, **settings: Any) -> None:
    with mpp_torchopt.innerloop_ctx(net, lslr or mpp.LSLR(per_step(), 3), **settings):
        pass


def number_in_torchopt(net: Net) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        inner_opt.step(1.5)


def all_frozen_since(net: Net) -> None:
    other = copy.deepcopy(net)
    lslr = mpp.LSLR(other, 3)
    run(other.requires_grad_(False), lslr=lslr)


def within_a_backward(net: Net) -> None:
    """As activation checkpointing does."""
    x = torch.randn(4, 3, requires_grad=True)
    with mpp.frozen_statistics(net):
        checkpoint(copy.deepcopy(net), x, use_reentrant=False).sum().backward()


class WritesToAView(nn.Sequential):
    def forward(self, input: Tensor) -> Any:
        features = self[0](input)
        features.view(len(input), -1).clamp_(min=0)
        return features


def write_to_a_view(net: Net, wrap: Callable[[Any], Any] = lambda call: call) -> None:
    model = WritesToAView(nn.Conv2d(1, 4, 3))
    with mpp.fast_kernels(model):
        wrap(model)(torch.randn(4, 1, 28, 28))


def nested_in_higher(net: Net) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)):
        enter_higher(net)


def steps_in_higher(net: Net, count: int) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, diffopt):
        for _ in range(count):
            diffopt.step(fnet(torch.randn(4, 3)).sum())


def steps_in_torchopt(net: Net, count: int) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        for _ in range(count):
            inner_opt.step(net(torch.randn(4, 3)).sum())


def diffopt_without_params(net: Net) -> None:
    optimizer = mpp_higher.LSLROptimizer(net, mpp.LSLR(net, 3))
    with mpp.frozen_statistics(net):
        loss = net(torch.randn(4, 3)).sum()
    higher.get_diff_optim(optimizer, list(net.parameters())).step(loss)


def two_loops(net: Net) -> None:
    older, newer = mpp.inner_steps(net, 3), mpp.inner_steps(net, 3)
    next(older)
    next(newer)
    next(older)


def rates_of(names: str, steps: int = 3) -> dict[str, Any]:
    return mpp.LSLR(per_step(), steps, adapt=names).state_dict()


def vmapped(net: Net) -> None:
    torch.func.vmap(net)(torch.randn(2, 4, 3))


def differentiated(net: Net) -> None:
    torch.func.grad(lambda x: net(x).sum())(torch.randn(4, 3))


def chain_of_another_model(net: Net) -> None:
    transform = mpp_torchopt.lslr_transform(mpp.LSLR(per_step(), 3))
    torchopt.MetaOptimizer(net, transform).step(net.head.weight.sum())


def not_reduced(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def mismatched() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False  # and keeps its buffers
    return layer


def tied_norms() -> nn.Module:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    return net


class Pair(nn.Linear):
    """A model that returns two things."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


def convert_inside_frozen(net: Net) -> None:
    with mpp.frozen_statistics(net):
        mpp.convert_batchnorm(net, 5)


def switch_before_backward(net: Net) -> None:
    other = copy.deepcopy(net)
    loss = run(other, rematerialize=True).loss
    other.eval()
    loss.backward()


def import_without(package: str, adapter: Any) -> None:
    with mock.patch.dict(sys.modules, {package: None}):
        runpy.run_path(adapter.__file__)


def import_with_torch(version: str) -> None:
    with mock.patch.object(torch, "__version__", version):
        runpy.run_path(mpp.__file__)


def among_others(net: Net, rank: int) -> None:
    """As in a group of processes that this one is not in, or of which another has more tasks."""

    def all_reduce(ends: Tensor, *_: Any) -> None:
        ends[0] += 1

    here = {"get_rank": lambda _: rank, "all_reduce": all_reduce}
    with mock.patch.multiple(gather.dist, **here):
        run(net, process_group=object())


norm1d, norm2d, norm3d = mpp.PerStepBatchNorm1d, mpp.PerStepBatchNorm2d, mpp.PerStepBatchNorm3d
msl, one = mpp.MultiStepLoss, torch.ones(())
x1, x2 = torch.ones(4, 4), torch.ones(2, 4, 3, 3)

# What is done to a model, the exception, and words of its message.
Row = tuple[Callable[[Net], Any], type[Exception], tuple[str, ...]]
COUNTS: dict[str, Row] = {
    "layer 0 steps": (lambda n: norm2d(4, 0), ValueError, ("num_steps", "at least 1", "got 0")),
    "layer -1 steps": (lambda n: norm1d(4, -1), ValueError, ("num_steps", "at least 1", "got -1")),
    "layer 2.5 steps": (
        lambda n: norm3d(4, 2.5),
        TypeError,
        ("num_steps", "whole number of at least 1", "got 2.5", "pass an int"),
    ),
    "layer True steps": (
        lambda n: norm2d(4, True),
        TypeError,
        ("num_steps", "got True of type bool", "pass an int"),
    ),
    "layer text steps": (lambda n: norm2d(4, "5"), TypeError, ("num_steps", "got '5' of type str")),
    "layer 0 features": (lambda n: norm2d(0, 5), ValueError, ("num_features", "at least 1")),
    "layer None features": (lambda n: norm2d(None, 5), TypeError, ("num_features", "got None")),
    "convert 0 steps": (
        lambda n: mpp.convert_batchnorm(n, 0),
        ValueError,
        ("num_steps", "at least 1", "got 0"),
    ),
    "convert 5.0 steps": (
        lambda n: mpp.convert_batchnorm(n, 5.0),
        TypeError,
        ("num_steps", "got 5.0 of type float", "pass an int"),
    ),
    "lslr 0 steps": (lambda n: mpp.LSLR(n, 0), ValueError, ("num_steps", "at least 1", "got 0")),
    "lslr 1.5 steps": (lambda n: mpp.LSLR(n, 1.5), TypeError, ("num_steps", "got 1.5", "an int")),
    "loop 0 steps": (lambda n: mpp.inner_steps(n, 0), ValueError, ("num_steps", "at least 1")),
    "loop -3 steps": (lambda n: mpp.inner_steps(n, -3), ValueError, ("num_steps", "got -3")),
    "loop 2.0 steps": (lambda n: mpp.inner_steps(n, 2.0), TypeError, ("num_steps", "got 2.0")),
    "loop over parameters": (
        lambda n: mpp.inner_steps(n.parameters(), 3),
        TypeError,
        ("expected the model", "of type generator", "pass the model itself"),
    ),
    "loop 4 steps on 3 rows": (
        lambda n: mpp.inner_steps(n, 4),
        ValueError,
        (
            "inner step 3",
            "layer 'norm' (PerStepBatchNorm1d)",
            "legal: 0 to 2",
            "num_steps=4",
            "extra_steps='last'",
        ),
    ),
    "at step -1": (lambda n: forward_at(n, -1), ValueError, ("step", "at least 0", "got -1")),
    "at step 1.0": (lambda n: forward_at(n, 1.0), TypeError, ("step", "got 1.0", "pass an int")),
    "at step 3 of 3": (
        lambda n: forward_at(n, 3),
        ValueError,
        ("inner step 3", "legal: 0 to 2", "fewer steps", "extra_steps='last'"),
    ),
    "kernels of parameters": (
        lambda n: mpp.fast_kernels(n.parameters()).__enter__(),
        TypeError,
        ("takes the model", "got generator", "pass the model that the inner loop calls"),
    ),
    "two loops": (two_loops, RuntimeError, ("another inner_steps loop", "use a copy")),
    "weights of 0 steps": (
        lambda n: mpp.multi_step_loss_weights(0, 0, 10),
        ValueError,
        ("num_steps", "at least 1", "got 0"),
    ),
    "weights at epoch -1": (
        lambda n: mpp.multi_step_loss_weights(5, -1, 10),
        ValueError,
        ("epoch", "at least 0", "got -1"),
    ),
    "weights at epoch 0.5": (
        lambda n: mpp.multi_step_loss_weights(5, 0.5, 10),
        TypeError,
        ("epoch", "got 0.5", "pass an int"),
    ),
    "annealed over -1 epochs": (lambda n: msl(5, -1), ValueError, ("anneal_epochs", "got -1")),
    "annealed over nan epochs": (lambda n: msl(5, math.nan), TypeError, ("anneal_epochs", "nan")),
    "order for -1 epochs": (
        lambda n: mpp.DerivativeOrderAnnealing(-1),
        ValueError,
        ("first_order_epochs", "at least 0", "got -1"),
    ),
    "order for True epochs": (
        lambda n: mpp.DerivativeOrderAnnealing(True),
        TypeError,
        ("first_order_epochs", "got True", "pass an int"),
    ),
}
LAYERS: dict[str, Row] = {
    "eps -1": (lambda n: norm2d(4, 5, eps=-1.0), ValueError, ("eps", "from 0 to 1", "got -1.0")),
    "eps nan": (lambda n: norm2d(4, 5, eps=math.nan), ValueError, ("eps", "0 to 1", "got nan")),
    "momentum 1.5": (
        lambda n: norm2d(4, 5, momentum=1.5),
        ValueError,
        ("momentum", "from 0 to 1 or None", "got 1.5", "default"),
    ),
    "momentum text": (lambda n: norm2d(4, 5, momentum="0.1"), ValueError, ("momentum", "'0.1'")),
    "extra steps first": (
        lambda n: norm2d(4, 5, extra_steps="first"),
        ValueError,
        ("extra_steps", "'error' or 'last'", "got 'first'", "reuses the last row"),
    ),
    "extra steps True": (
        lambda n: mpp.convert_batchnorm(n, 5, extra_steps=True),
        ValueError,
        ("extra_steps", "got True"),
    ),
    "lslr extra steps None": (
        lambda n: mpp.LSLR(n, 5, extra_steps=None),
        ValueError,
        ("extra_steps", "got None"),
    ),
    "integers, in eval": (
        lambda n: norm1d(4, 3).eval()(x1.to(torch.uint8)),
        TypeError,
        ("expects floating-point input", "got torch.uint8", ".float()"),
    ),
    "within a backward": (
        within_a_backward,
        RuntimeError,
        ("called within a backward", "activation checkpointing", "rematerialize=True", "at_step"),
    ),
    "1d given 4": (
        lambda n: norm1d(4, 3)(x2),
        ValueError,
        ("[N, C] or [N, C, L]", "got (2, 4, 3, 3)", "reshape it or use the layer"),
    ),
    "2d given 2": (lambda n: norm2d(4, 3)(x1), ValueError, ("[N, C, H, W]", "got (4, 4)")),
    "2d given 3": (lambda n: norm2d(4, 3)(x2[0]), ValueError, ("[N, C, H, W]", "(4, 3, 3)")),
    "3d given 4": (lambda n: norm3d(4, 3)(x2), ValueError, ("[N, C, D, H, W]", "(2, 4, 3, 3)")),
    "wrong channels": (
        lambda n: n.norm(torch.ones(2, 7)),
        ValueError,
        ("expects 4 channels", "got 7", "num_features=7"),
    ),
    "one value per channel": (
        lambda n: n(torch.ones(1, 3)),
        ValueError,
        ("more than 1 value per channel", "(1, 4)", "larger batch", ".eval()"),
    ),
    "under vmap": (
        vmapped,
        RuntimeError,
        ("running statistics in place", "torch.func", "task_batch_loss", "frozen_statistics"),
    ),
    "under torch.func.grad": (
        differentiated,
        RuntimeError,
        ("running statistics in place", "torch.func", "task_batch_loss", "frozen_statistics"),
    ),
}
RATES: dict[str, Row] = {
    "parameters for a model": (
        lambda n: mpp.LSLR(n.parameters(), 5),
        TypeError,
        ("torch.nn.Module", "got generator", "pass the model itself"),
    ),
    "update with lists": (
        lambda n: mpp.LSLR(n, 3).update([*n.parameters()], [*n.parameters()], 0),
        TypeError,
        ("params must be a dict by name", "got list", "dict(model.named_parameters())"),
    ),
    "lr nan": (lambda n: mpp.LSLR(n, 5, lr=math.nan), ValueError, ("lr", "finite", "got nan")),
    "lr inf": (lambda n: mpp.LSLR(n, 5, lr=math.inf), ValueError, ("lr", "finite", "got inf")),
    "lr -0.1": (
        lambda n: mpp.LSLR(n, 5, lr=-0.1),
        ValueError,
        ("lr", "at least 0", "got -0.1", "may turn a rate negative later"),
    ),
    "lr text": (lambda n: mpp.LSLR(n, 5, lr="0.1"), ValueError, ("lr", "got '0.1'")),
    "lr True": (lambda n: mpp.LSLR(n, 5, lr=True), ValueError, ("lr", "got True")),
    "lr for each tensor": (
        lambda n: mpp.LSLR(n, 5, lr=[0.1, 0.2]),
        ValueError,
        ("lr", "finite number", "got [0.1, 0.2]"),
    ),
    "pattern of nothing": (
        lambda n: mpp.LSLR(n, 5, adapt=["head.*", "tail.*"]),
        ValueError,
        ("'tail.*' matches no parameter", "'body.weight'", "'head.bias'"),
    ),
    "callable of nothing": (
        lambda n: mpp.LSLR(n, 5, adapt=lambda name: False),
        ValueError,
        ("nothing is left to adapt in Sequential", "'body.weight'"),
    ),
    "adapt empty": (
        lambda n: mpp.LSLR(n, 5, adapt=[]),
        ValueError,
        ("nothing is left to adapt", "adapt=[]"),
    ),
    "adapt a number": (
        lambda n: mpp.LSLR(n, 5, adapt=5),
        TypeError,
        ("adapt", "callable", "pattern", "got 5"),
    ),
    "adapt numbers": (
        lambda n: mpp.LSLR(n, 5, adapt=[1, 2]),
        TypeError,
        ("adapt", "callable", "pattern", "1"),
    ),
    "only per-step layers": (
        lambda n: mpp.LSLR(n.norm, 5),
        ValueError,
        ("nothing is left to adapt in PerStepBatchNorm1d", "'weight', 'bias'"),
    ),
    "rates before the model": (
        lambda n: mpp_higher.LSLROptimizer(n.parameters(), mpp.LSLR(n, 3)),
        TypeError,
        ("a torch.nn.Module, got generator", "model first and its LSLR second"),
    ),
    "update lacks a parameter": (
        lambda n: update(n, without_param="head.bias"),
        KeyError,
        ("params lacks 'head.bias'", "it has", "by its name in named_parameters()"),
    ),
    "update lacks a gradient": (
        lambda n: update(n, without_grad="body.weight"),
        KeyError,
        ("grads lacks 'body.weight'", "a missing gradient as None"),
    ),
    "update with a gradient that would broadcast": (
        lambda n: update(n, **{"head.bias": torch.zeros(4, 2)}),
        ValueError,
        ("gradient of 'head.bias' has shape (4, 2)", "the parameter (2,)", "this very tensor"),
    ),
    "update at step 3 of 3": (
        lambda n: update(n, step=3),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "update at step -1": (lambda n: update(n, step=-1), ValueError, ("step", "got -1")),
    "update at step 0.5": (lambda n: update(n, step=0.5), TypeError, ("step", "got 0.5")),
    "table of other names": (
        lambda n: mpp.LSLR(n, 3, adapt="head.*").load_state_dict(rates_of("body.*")),
        RuntimeError,
        ("only there 'body.weight'", "only in this LSLR 'head.weight'", "nothing was loaded"),
    ),
    "table of other steps": (
        lambda n: mpp.LSLR(n, 3, adapt="*").load_state_dict(rates_of("*", steps=5)),
        RuntimeError,
        ("num_steps=5", "num_steps=3"),
    ),
}
LOSSES: dict[str, Row] = {
    "too few": (
        lambda n: msl(3, 10)([one, one]),
        ValueError,
        ("must hold 3 losses", "got 2", "after every update"),
    ),
    "too many": (lambda n: msl(3, 10)([one] * 4), ValueError, ("must hold 3 losses", "got 4")),
    "too few in a tensor": (lambda n: msl(3, 10)(torch.ones(4, 2)), ValueError, ("3", "got 2")),
    "none": (lambda n: mpp.FinalStepLoss()([]), ValueError, ("at least one", "got 0")),
    "floats": (
        lambda n: msl(2, 10)([one, 0.5]),
        TypeError,
        ("one tensor for each inner step", "got 0.5 of type float", "not loss.item()"),
    ),
    "one float": (
        lambda n: msl(1, 10)(0.5),
        TypeError,
        ("step_losses", "tensor", "got 0.5", "not loss.item()"),
    ),
    "one vector among them": (
        lambda n: msl(2, 10)([one, torch.ones(3)]),
        ValueError,
        ("step_losses", "(3,)"),
    ),
    "state of other steps": (
        lambda n: msl(3, 10).load_state_dict(msl(5, 10).state_dict()),
        ValueError,
        ("num_steps=3", "num_steps=5", "build it with the latter"),
    ),
    "state of another schedule": (
        lambda n: msl(3, 10).load_state_dict(mpp.FinalStepLoss().state_dict()),
        ValueError,
        ("'anneal_epochs', 'last_epoch', 'num_steps'", "got ['last_epoch']", "state_dict()"),
    ),
    "state at epoch 1.5": (
        lambda n: mpp.FinalStepLoss().load_state_dict({"last_epoch": 1.5}),
        TypeError,
        ("last_epoch", "got 1.5"),
    ),
    "state at epoch -1": (
        lambda n: mpp.DerivativeOrderAnnealing(3).load_state_dict(
            {"first_order_epochs": 3, "last_epoch": -1}
        ),
        ValueError,
        ("last_epoch", "at least 0", "got -1"),
    ),
}
TASK_BATCHES: dict[str, Row] = {
    "0 steps": (lambda n: run(n, num_steps=0), ValueError, ("num_steps", "at least 1", "got 0")),
    "1.5 steps": (lambda n: run(n, num_steps=1.5), TypeError, ("num_steps", "got 1.5")),
    "chunks of 0": (lambda n: run(n, chunk_size=0), ValueError, ("chunk_size", "at least 1")),
    "chunks of 0.5": (lambda n: run(n, chunk_size=0.5), TypeError, ("chunk_size", "got 0.5")),
    "more steps than rows": (
        lambda n: run(n, num_steps=4, lslr=mpp.LSLR(n, 4)),
        ValueError,
        ("inner step 3", "layer 'norm'", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "more steps than rates": (
        lambda n: run(n, lslr=mpp.LSLR(n, 2)),
        ValueError,
        ("inner step 2", "LSLR with num_steps=2", "legal: 0 to 1"),
    ),
    "three tensors": (
        lambda n: run(n, data=batch()[:3]),
        ValueError,
        ("x_support", "[T, S, ...]", "got [(2, 4, 3), (2, 4), (2, 5, 3)]", "stack the tasks"),
    ),
    "lists": (
        lambda n: run(n, data=[[1], [2], [3], [4]]),
        ValueError,
        ("y_target", "got ['list', 'list', 'list', 'list']", "stack the tasks"),
    ),
    "one task alone": (
        lambda n: run(n, data=[part[0] for part in batch()]),
        ValueError,
        ("got [(4, 3), (4,), (5, 3), (5,)]", "new dimension 0"),
    ),
    "other numbers of tasks": (
        lambda n: run(n, data=[*batch(2)[:2], *batch(3)[2:]]),
        ValueError,
        ("must agree in T", "'x_target': (3, 5)"),
    ),
    "other numbers of examples": (
        lambda n: run(n, data=[batch()[0], batch(support=6)[1], *batch()[2:]]),
        ValueError,
        ("number of examples", "'x_support': (2, 4), 'y_support': (2, 6)"),
    ),
    "no task": (lambda n: run(n, data=batch(0)), ValueError, ("at least one task", "(0, 4)")),
    "no example": (
        lambda n: run(n, data=batch(support=0)),
        ValueError,
        ("at least one", "(2, 0)", "x_support"),
    ),
    "loss not reduced": (
        lambda n: run(n, loss=not_reduced),
        ValueError,
        ("one 0-dim tensor", "got shape (4,)", "reduction='mean'"),
    ),
    "loss a float": (
        lambda n: run(n, loss=lambda a, b: 0.5),
        TypeError,
        ("one 0-dim tensor", "got float"),
    ),
    "switched before the backward": (
        switch_before_backward,
        RuntimeError,
        ("switched between train, eval or frozen_statistics", "call backward first"),
    ),
    "losses of other steps": (
        lambda n: run(n, aggregate=msl(2, 10)),
        ValueError,
        ("num_steps=2", "num_steps=3"),
    ),
    "a dict": (
        lambda n: run(n, data=dict(zip("abcd", batch(), strict=True))),
        ValueError,
        ("x_support", "got dict", "stack the tasks"),
    ),
    "no loss": (
        lambda n: run(n, loss=None),
        TypeError,
        ("loss_fn must be callable", "got None of type NoneType", "cross_entropy"),
    ),
    "aggregate by name": (
        lambda n: run(n, aggregate="mean"),
        TypeError,
        ("aggregate must be callable", "got 'mean' of type str", "MultiStepLoss(...) or None"),
    ),
    "aggregate of the tasks": (
        lambda n: run(n, aggregate=lambda losses: losses[-1]),
        ValueError,
        ("[T] = (2,)", "[T, num_steps] = (2, 3)", "got shape (3,)", "losses.mean(-1)"),
    ),
    "aggregate to a number": (
        lambda n: run(n, aggregate=lambda losses: losses.sum().item()),
        ValueError,
        ("[T] = (2,)", "got float", "losses.mean(-1)"),
    ),
    "order by its schedule": (
        lambda n: run(n, second_order=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        (
            "second_order must be True or False",
            "got DerivativeOrderAnnealing(last_epoch=0, first_order_epochs=5)",
            "da.second_order",
        ),
    ),
    "in inference mode": (
        torch.inference_mode()(run),
        RuntimeError,
        ("torch.inference_mode() rules out", "under torch.no_grad()"),
    ),
    "what vmap cannot run": (
        lambda n: run(n, loss=lambda a, b: a.sum() * a.sum().item()),
        RuntimeError,
        (".item()", "torch.func.vmap cannot run", "chunk_size=1"),
    ),
    "everything frozen since": (
        all_frozen_since,
        ValueError,
        ("every parameter that this LSLR adapts", "'head.bias'", "requires_grad_(True)"),
    ),
    "an optimizer for rates": (
        lambda n: run(n, lslr=torch.optim.SGD(n.parameters(), 0.1)),
        TypeError,
        ("expected the inner rates, an LSLR", "got SGD", "LSLR(model, num_steps, lr)"),
    ),
    "rates of another model": (
        lambda n: run(n, lslr=mpp.LSLR(without_norm(), 3)),
        ValueError,
        ("this LSLR adapts '0.weight'", "Sequential does not have", "build the table from"),
    ),
}
CONTEXTS: dict[str, Row] = {
    "higher, rates of another model": (
        lambda n: enter_higher(n, mpp.LSLR(without_norm(), 3)),
        ValueError,
        ("this LSLR adapts '0.weight'", "it has 'body.weight'", "build the table from this model"),
    ),
    "torchopt, rates of another model": (
        lambda n: enter_torchopt(n, mpp.LSLR(without_norm(), 3)),
        ValueError,
        ("this LSLR adapts '0.weight'", "it has 'body.weight'", "build the table from this model"),
    ),
    "higher, patched again": (
        lambda n: inside_higher(n, enter_higher),
        ValueError,
        ("'body.weight'", "adapted weights instead of parameters", "pass the original model"),
    ),
    "higher, nested": (
        nested_in_higher,
        RuntimeError,
        ("inside an innerloop_ctx already", "leave one before", "copy.deepcopy of the model"),
    ),
    "higher, inside torchopt": (
        lambda n: inside_torchopt(n, enter_higher),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "torchopt, nested": (
        lambda n: inside_torchopt(n, enter_torchopt),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "torchopt, patched": (
        lambda n: inside_higher(n, enter_torchopt),
        ValueError,
        ("'body.weight'", "or patched", "pass the original model"),
    ),
    "task batch, inside torchopt": (
        lambda n: inside_torchopt(n, lambda net: run(net, lslr=mpp.LSLR(per_step(), 3))),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "task batch, patched": (
        lambda n: inside_higher(n, lambda net: run(net, lslr=mpp.LSLR(per_step(), 3))),
        ValueError,
        ("'body.weight'", "or patched", "pass the original model"),
    ),
    "higher, steps": (
        lambda n: steps_in_higher(n, 4),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "torchopt, steps": (
        lambda n: steps_in_torchopt(n, 4),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "higher, a loss without a graph": (
        torch.no_grad()(lambda n: steps_in_higher(n, 1)),
        RuntimeError,
        ("has no graph", "torch.no_grad()", "track_higher_grads=False"),
    ),
    "torchopt, a number for the loss": (
        number_in_torchopt,
        TypeError,
        ("got 1.5 of type float", "not loss.item()"),
    ),
    "torchopt, order by its schedule": (
        lambda n: enter_torchopt(n, second_order=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("second_order must be True or False", "da.second_order"),
    ),
    "higher, order by its schedule": (
        lambda n: enter_higher(n, second_order=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("second_order must be True or False", "da.second_order"),
    ),
    "higher, override of a rate": (
        lambda n: inside_higher(n, lambda net: None, override={"lr": [0.5]}),
        ValueError,
        ("override of ['lr']", "legal is 'second_order'", "lslr.rates"),
    ),
    "higher, no parameters": (
        diffopt_without_params,
        ValueError,
        ("params=None", "no patched model", "pass params"),
    ),
    "torchopt, unknown parameters": (
        lambda n: mpp_torchopt.lslr_transform(mpp.LSLR(n, 3)).init([torch.ones(2)]),
        ValueError,
        ("1 parameters", "'head.bias'", "dict(net.named_parameters())"),
    ),
    "torchopt, another model": (
        chain_of_another_model,
        ValueError,
        ("cannot tell which", "'body.weight'", "from this very model"),
    ),
}
CONVERSIONS: dict[str, Row] = {
    "not a module": (
        lambda n: mpp.convert_batchnorm(n.parameters(), 5),
        TypeError,
        ("torch.nn.Module", "got generator", "pass the model itself"),
    ),
    "converted already": (
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("no nn.BatchNorm1d, 2d or 3d", "it is converted already", "leave this call out"),
    ),
    "patched": (
        lambda n: inside_higher(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "adapted weights instead of parameters", "convert the original model"),
    ),
    "rates of the patched": (
        lambda n: inside_higher(n, lambda net: mpp.LSLR(net, 3)),
        ValueError,
        ("adapted weights instead of parameters", "before the loop"),
    ),
    "inside torchopt": (
        lambda n: inside_torchopt(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "adapted weights instead of parameters", "convert the original model"),
    ),
}
OUTSIDE: dict[str, Row] = {
    "a view of a feature map written to": (
        write_to_a_view,
        RuntimeError,
        ("writes in place to a view of a feature map", "channels_last", "clamp(min=0)"),
    ),
    "setup, an optimizer for rates": (
        lambda n: mpp.check_setup(n, torch.optim.SGD(n.parameters(), 0.1)),
        TypeError,
        ("expected the inner rates, an LSLR", "got SGD"),
    ),
    "setup, order for losses": (
        lambda n: mpp.check_setup(n, None, multi_step_loss=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("multi_step_loss must be", "got DerivativeOrderAnnealing", "by its own name"),
    ),
    "setup, losses for order": (
        lambda n: mpp.check_setup(n, None, derivative_order=msl(3, 10)),
        TypeError,
        ("derivative_order must be", "got MultiStepLoss", "by its own name"),
    ),
    "benchmark, no task at once": (
        lambda n: Question("module:model", (20,), chunk_size=0),
        ValueError,
        ("chunk_size must be at least 1", "got 0"),
    ),
    "torch, too old": (
        lambda n: import_with_torch("2.5.1+cpu"),
        ImportError,
        ("from 2.6 up to, not including, 3.0", "found 2.5.1+cpu", "pip install"),
    ),
    "processes, not in the group": (
        lambda n: among_others(n, rank=-1),
        ValueError,
        ("not in process_group", "torch.distributed.group.WORLD"),
    ),
    "processes, another has more tasks": (
        lambda n: among_others(n, rank=0),
        ValueError,
        ("got 2 to 3 tasks", "here 2", "multiple of the number of processes"),
    ),
    "command, no colon": (
        lambda n: command.load_model("my_models"),
        ValueError,
        ("'my_models' is not of the form package.module:name",),
    ),
    "command, no such name": (
        lambda n: command.load_model("math:pie"),
        ImportError,
        ("module math has no 'pie'", "it defines"),
    ),
    "command, no model": (
        lambda n: command.load_model("math:pi"),
        TypeError,
        ("math:pi gave a float", "name a torch.nn.Module", "without arguments"),
    ),
    "command, no shape": (
        lambda n: list(command.describe(n, 3, None, command.read_shape("3x4"))),
        ValueError,
        ("--shape", "at least 1", "got '3x4'", "such as 1,28,28"),
    ),
    "command, two outputs": (
        lambda n: list(command.describe(Pair(), 3, None, (3,))),
        TypeError,
        ("returned a tuple", "leave --shape out", "wrapper"),
    ),
    "benchmark, two outputs": (
        lambda n: check_logits(Pair(), (torch.randn(1, 5, 3),) * 4, 2),
        TypeError,
        ("returned a tuple", "needs logits", "name a wrapper"),
    ),
    "benchmark, too few outputs": (
        lambda n: check_logits(n, (torch.randn(1, 5, 3),) * 4, 3),
        ValueError,
        ("shape (5, 2) for 5 inputs", "[5, 3 or more]", "set --ways"),
    ),
    "benchmark, channels_last without images": (
        lambda n: Question("module:model", (20,), channels_last=True),
        ValueError,
        ("channels_last is a layout of images [C, H, W]", "(20,)", "leave it out"),
    ),
    "CUDA graph, rematerialised": (
        lambda n: graphed(n, rematerialize=True),
        ValueError,
        ("cuda_graph=True cannot capture", "rematerialize=True", "leave one of them out"),
    ),
    "CUDA graph, several processes": (
        lambda n: graphed(n, process_group=object()),
        ValueError,
        ("cuda_graph=True cannot capture", "a process_group", "leave one of them out"),
    ),
    "CUDA graph, on the CPU": (
        lambda n: graphed(n)(*batch()),
        ValueError,
        ("on one GPU", "got ['cpu']", "move them there, or leave cuda_graph out"),
    ),
    "CUDA graph, waiting": (
        wait_for_the_gpu,
        RuntimeError,
        ("cannot be captured", "called a synchronizing", ".item()", "leave cuda_graph out"),
    ),
    "benchmark, no GPU": (
        without_gpu,
        ValueError,
        ("device 'cuda' was asked for", "finds no GPU", "use 'cpu'"),
    ),
    "benchmark, too slow": (
        lambda n: measure.in_fresh_process(time.sleep, 60, seconds=0.01),
        TimeoutError,
        ("not done within 0.01 seconds", "allow more"),
    ),
    "benchmark, out of memory": (
        lambda n: measure.in_fresh_process(os._exit, 9, seconds=60),
        RuntimeError,
        ("exit code 9", "-9: killed", "fewer tasks or steps"),
    ),
    "higher is not installed": (
        lambda n: import_without("higher", mpp_higher),
        ImportError,
        ("needs the package higher", "pip install 'mamlpp_ext[higher]'"),
    ),
    "torchopt is not installed": (
        lambda n: import_without("torchopt", mpp_torchopt),
        ImportError,
        ("needs the package torchopt", "pip install 'mamlpp_ext[torchopt]'"),
    ),
}
# The same after which model it is done to.
OTHER_MODELS: dict[str, tuple[Any, ...]] = {
    "pattern of the frozen": (
        frozen,
        lambda n: mpp.LSLR(n, 5, adapt="*"),
        ValueError,
        ("'*' matches no parameter that requires grad", "there are none"),
    ),
    "everything frozen": (
        frozen,
        lambda n: mpp.LSLR(n, 5),
        ValueError,
        ("nothing is left to adapt", "parameters that require grad: none"),
    ),
    "convert without BatchNorm": (
        without_norm,
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("Sequential has no nn.BatchNorm1d, 2d or 3d", "(none)", "leave this call out"),
    ),
    "convert SyncBatchNorm": (
        with_layer(lambda: nn.SyncBatchNorm(4)),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (SyncBatchNorm)", "cannot be expressed", "replace it"),
    ),
    "convert a lazy layer": (
        with_layer(nn.LazyBatchNorm1d),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (LazyBatchNorm1d)", "lazy", "run the model once"),
    ),
    "convert flags without buffers": (
        with_layer(mismatched),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (BatchNorm1d)", "track_running_stats=False with running buffers", "agree first"),
    ),
    "convert tied layers": (
        tied_norms,
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'0' (BatchNorm1d)", "shares its weight or bias", "parameters of its own"),
    ),
    "convert inside frozen_statistics": (
        plain,
        convert_inside_frozen,
        ValueError,
        ("'norm'", "inside frozen_statistics", "before that context"),
    ),
    "task batch of two outputs": (
        Pair,
        lambda n: run(n, loss=lambda pair, labels: pair[0].sum()),
        TypeError,
        ("must return one tensor, got tuple", "wrap it"),
    ),
    "convert a hooked layer": (
        with_layer(hooked),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (BatchNorm1d)", "has hooks", "register them on the converted layer"),
    ),
    "convert a patched model": (
        plain,
        lambda n: inside_higher(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "patched already", "convert the original model"),
    ),
    "torchopt, tied parameters in a chain": (
        tied,
        lambda n: torchopt.MetaOptimizer(n, mpp_torchopt.lslr_transform(mpp.LSLR(n, 3))).step(
            n(torch.ones(2, 3)).sum()
        ),
        ValueError,
        ("'0.weight'", "several places", "use MetaLSLR"),
    ),
    "task batch of a plain BatchNorm": (
        plain,
        run,
        ValueError,
        (
            "layer 'norm' (BatchNorm1d)",
            "convert_batchnorm(model, num_steps)",
            "1, extra_steps",
            "track_running_stats=False",
        ),
    ),
}
TABLE: dict[str, tuple[Any, ...]] = {
    **{
        name: (per_step, *row)
        for part in (COUNTS, LAYERS, RATES, TASK_BATCHES, CONTEXTS, OUTSIDE)
        for name, row in part.items()
    },
    **{f"losses: {name}": (per_step, *row) for name, row in LOSSES.items()},
    **{f"convert: {name}": (per_step, *row) for name, row in CONVERSIONS.items()},
    **OTHER_MODELS,
}


@pytest.mark.parametrize(
    ("build", "act", "error", "words"),
    [pytest.param(*row, id=name) for name, row in TABLE.items()],
)
def test_bad_input(
    build: Callable[[], Net],
    act: Callable[[Net], Any],
    error: type[Exception],
    words: tuple[str, ...],
    unchanged: Any,
) -> None:
    net = build()
    with unchanged(net), pytest.raises(error) as info:
        act(net)
    assert type(info.value) is error
    message = str(info.value.args[0])  # str() of a KeyError is quoted
    assert not [word for word in words if word not in message], message


def test_table_is_long_enough() -> None:
    assert len(TABLE) >= 35
