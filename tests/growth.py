"""Trains a tiny net in every backend for long and prints what memory it then holds.

    python tests/growth.py ITERATIONS

One line of JSON for each backend, of iteration 50 and of the last: the live tensors, the bytes
behind them and those resident. A process of its own, so that nothing else lives in it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

STEPS, TASKS, EXAMPLES, WIDTH = 2, 2, 16, 32
EARLY = 50
LEAK: list[object] = []

# Of a net, its rates and a batch, in second order or not; leaves the gradients.
Iteration = Callable[[nn.Module, mpp.LSLR, tuple[Tensor, ...], bool], None]


def in_turn(adapt: Callable[..., Tensor]) -> Iteration:
    """The loop over tasks, for a backend that takes one."""

    def iteration(net, lslr, batch, second_order):  # type: ignore[no-untyped-def]
        for task in zip(*batch, strict=True):
            adapt(net, lslr, task, second_order).backward()

    return iteration


def by_higher(net, lslr, task, second_order):  # type: ignore[no-untyped-def]
    x_support, y_support, x_target, y_target = task
    with mpp_higher.innerloop_ctx(net, lslr, second_order=second_order) as (fnet, diffopt):
        for _ in mpp.inner_steps(fnet, STEPS):
            diffopt.step(F.cross_entropy(fnet(x_support), y_support))
        return F.cross_entropy(fnet(x_target), y_target)


def by_torchopt(net, lslr, task, second_order):  # type: ignore[no-untyped-def]
    x_support, y_support, x_target, y_target = task
    with mpp_torchopt.innerloop_ctx(net, lslr, second_order=second_order) as inner_opt:
        for _ in mpp.inner_steps(net, STEPS):
            inner_opt.step(F.cross_entropy(net(x_support), y_support))
        return F.cross_entropy(net(x_target), y_target)


def by_loop(net, lslr, task, second_order):  # type: ignore[no-untyped-def]
    x_support, y_support, x_target, y_target = task
    params = dict(net.named_parameters())
    for step in mpp.inner_steps(net, STEPS):
        loss = F.cross_entropy(torch.func.functional_call(net, params, (x_support,)), y_support)
        wanted = [params[name] for name in lslr.names]
        grads = torch.autograd.grad(loss, wanted, create_graph=second_order)
        params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
    return F.cross_entropy(torch.func.functional_call(net, params, (x_target,)), y_target)


def by_task_batch(**options: object) -> Iteration:
    def iteration(net, lslr, batch, second_order):  # type: ignore[no-untyped-def]
        result = mpp.task_batch_loss(
            net, lslr, batch, F.cross_entropy, num_steps=STEPS, second_order=second_order, **options
        )
        result.loss.backward()

    return iteration


def leaking(kept: Callable[[nn.Module, Tensor], object]) -> Iteration:
    """An iteration with a fault, which the test of this file must see."""

    def iteration(net, lslr, batch, second_order):  # type: ignore[no-untyped-def]
        loss = F.cross_entropy(net(batch[0][0]), batch[1][0])
        LEAK.append(kept(net, loss))
        loss.backward()

    return iteration


def graph_alone(net: nn.Module, loss: Tensor) -> object:
    """A graph whose tensors Python does not know: only what is resident shows it."""
    return torch.exp(net[0].bias[:1].expand(50_000)).grad_fn


BACKENDS: dict[str, Iteration] = {
    "higher": in_turn(by_higher),
    "torchopt": in_turn(by_torchopt),
    "plain loop": in_turn(by_loop),
    "task batch": by_task_batch(),
    "rematerialised": by_task_batch(rematerialize=True),
    "chunked": by_task_batch(chunk_size=1),
}
LEAKS = {"leaked loss": leaking(lambda net, loss: loss), "leaked graph": leaking(graph_alone)}


def held() -> dict[str, int]:
    """Returns the number of live tensors, the bytes behind them and the resident bytes."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {
        "tensors": len(tensors),
        "bytes": sum(sizes.values()),
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
    }


def measure(iteration: Iteration, iterations: int) -> list[dict[str, int]]:
    torch.manual_seed(0)
    layers = nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)
    net = mpp.convert_batchnorm(nn.Sequential(*layers), STEPS)
    lslr = mpp.LSLR(net, STEPS)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()])
    x, y = torch.randn(TASKS, EXAMPLES, 8), torch.randint(3, (TASKS, EXAMPLES))
    found = []
    for count in range(1, iterations + 1):
        meta_opt.zero_grad()
        iteration(net, lslr, (x, y, x.clone(), y.clone()), count % 2 == 0)
        meta_opt.step()
        if count in (EARLY, iterations):
            found.append(held())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, iteration in {**BACKENDS, **LEAKS}.items():
        sys.stdout.write(json.dumps([name, measure(iteration, int(sys.argv[1]))]) + "\n")
        LEAK.clear()
