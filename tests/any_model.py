"""Any model in every path of the package, and in a loop written out, to be held against each other.

The model may take several inputs (a tuple, or a dict by name) and return several outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import mamlpp_ext as mpp
from mamlpp_ext.integrations import higher, torchopt

STEPS = 2
TASKS = 2
Batch = tuple[Any, Any, Any, Any]
Loss = Callable[[Any, Any], Tensor]
# Meta-loss, gradients by name and of the rates, and buffers.
Found = dict[str, Tensor | None]


def call(model: Any, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def tasks_in(batch: Batch) -> range:
    return range(len(tree_leaves(batch)[0]))


def task_of(batch: Batch, task: int) -> Batch:
    return tree_map(lambda t: t[task], batch)


def size_of_outputs(output: Any, labels: Any) -> Tensor:
    """A loss of whatever a model returns; labels shift it."""
    floats = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    shift = sum((t.to(floats[0].dtype).mean() for t in tree_leaves(labels)), 0.0)
    return sum((t.square() + t - 0.1 * shift * t).mean() for t in floats)


def written_out(net: nn.Module, lslr: mpp.LSLR, batch: Batch, loss_fn: Loss, order: bool) -> Tensor:
    """The ground truth: weights put in place one by one, nothing of the package in the loop."""
    places = [
        (layer._parameters, key, id(p))
        for layer in net.modules()
        for key, p in layer._parameters.items()
        if p is not None
    ]
    learned = {id(p): name for name, p in net.named_parameters()}
    own = dict(net.named_parameters())
    kernels = sdpa_kernel(SDPBackend.MATH) if order else nullcontext()

    def forward(params: dict[str, Tensor], x: Any) -> Any:
        try:
            for held, key, place in places:
                held[key] = params[learned[place]]
            return call(net, x)
        finally:
            for held, key, place in places:
                held[key] = own[learned[place]]

    losses = []
    with kernels:
        for task in tasks_in(batch):
            x, y, x_target, y_target = task_of(batch, task)
            params: dict[str, Tensor] = dict(own)
            for step in mpp.inner_steps(net, STEPS):
                support = loss_fn(forward(params, x), y)
                wanted = {n: params[n] for n in lslr.names if params[n].requires_grad}
                grads = torch.autograd.grad(
                    support, [*wanted.values()], create_graph=order, allow_unused=True
                )
                for (name, p), grad in zip(wanted.items(), grads, strict=True):
                    if grad is not None:
                        rate = lslr.rates[lslr.names.index(name), step]
                        params[name] = p - rate * grad.to_dense()
                losses.append(loss_fn(forward(params, x_target), y_target))
    return torch.stack(losses).mean()


def in_loop(model: Any, step: Callable[[Tensor], Any], task: Batch, loss_fn: Loss) -> Tensor:
    losses = []
    for _ in mpp.inner_steps(model, STEPS):
        step(loss_fn(call(model, task[0]), task[1]))
        losses.append(loss_fn(call(model, task[2]), task[3]))
    return torch.stack(losses).mean()


def by_higher(net: nn.Module, lslr: mpp.LSLR, batch: Batch, loss_fn: Loss, order: bool) -> Tensor:
    losses = []
    for task in tasks_in(batch):
        with higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
            losses.append(in_loop(fnet, diffopt.step, task_of(batch, task), loss_fn))
    return torch.stack(losses).mean()


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, batch: Batch, loss_fn: Loss, order: bool) -> Tensor:
    losses = []
    for task in tasks_in(batch):
        with torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
            losses.append(in_loop(net, inner_opt.step, task_of(batch, task), loss_fn))
    return torch.stack(losses).mean()


def by_hand(net: nn.Module, lslr: mpp.LSLR, batch: Batch, loss_fn: Loss, order: bool) -> Tensor:
    losses = []

    def forward(params: dict[str, Tensor], x: Any) -> Any:
        if isinstance(x, dict):
            return mpp.functional_call(net, params, kwargs=x)
        return mpp.functional_call(net, params, x)

    with mpp.twice_differentiable(net, second_order=order):
        for task in tasks_in(batch):
            x, y, x_target, y_target = task_of(batch, task)
            params: dict[str, Tensor] = dict(net.named_parameters())
            for step in mpp.inner_steps(net, STEPS, second_order=order):
                loss = loss_fn(forward(params, x), y)
                wanted = [params[name] for name in lslr.names]
                grads = torch.autograd.grad(loss, wanted, create_graph=order, allow_unused=True)
                params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
                losses.append(loss_fn(forward(params, x_target), y_target))
    return torch.stack(losses).mean()


def by_task_batch(**form: Any) -> Callable[..., Tensor]:
    def run(net: nn.Module, lslr: mpp.LSLR, batch: Batch, loss_fn: Loss, order: bool) -> Tensor:
        how = {"num_steps": STEPS, "second_order": order, "aggregate": lambda t: t.mean(-1)}
        return mpp.task_batch_loss(net, lslr, batch, loss_fn, **how, **form).loss

    return run


PATHS: dict[str, Callable[..., Tensor]] = {
    "plain loop": by_hand,
    "higher": by_higher,
    "torchopt": by_torchopt,
    "task_batch_loss": by_task_batch(),
    "rematerialize": by_task_batch(rematerialize=True),
    "chunk_size=1": by_task_batch(chunk_size=1),
}


def outcome(
    path: Callable[..., Tensor],
    net: nn.Module,
    batch: Batch,
    loss_fn: Loss = size_of_outputs,
    *,
    second_order: bool,
    adapt: Any = None,
) -> Found:
    """Returns what a copy of the model learns and what is left in it."""
    # Of the model itself, too: torch cannot copy the buffers of lazy layers.
    mpp.LSLR(net, STEPS, adapt=adapt)
    net = copy.deepcopy(net)
    lslr = mpp.LSLR(net, STEPS, 0.05, adapt=adapt)
    with torch.no_grad():
        lslr.rates.mul_(torch.linspace(0.5, 1.5, lslr.rates.numel()).view_as(lslr.rates))
    loss = path(net, lslr, batch, loss_fn, second_order)
    loss.backward()
    grads = {
        name: None if p.grad is None else p.grad.to_dense() for name, p in net.named_parameters()
    }
    return {"loss": loss.detach(), "rates": lslr.rates.grad, **grads, **dict(net.named_buffers())}


def assert_same(found: Found, expected: Found, tolerance: float = 1e-9) -> None:
    """Each within a share of its largest value; None is as good as zeros."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        if want is None or got is None:
            assert all(t is None or not t.count_nonzero() for t in (want, got)), name
            continue
        scale = max(float(want.abs().max()) if want.numel() else 0.0, 1e-3)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale, msg=name)
