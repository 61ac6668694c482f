"""What a batch of tasks refuses."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from error_tables import (
    Net,
    Row,
    Table,
    batch,
    checked,
    done_to,
    per_step,
    plain,
    run,
    without_norm,
)
from mamlpp_ext.task_batch import cuda_graph, gather

pytestmark = pytest.mark.usefixtures("float64")


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


def count_in(net: Net) -> None:
    vars(net)["calls"] = vars(net).get("calls", 0) + 1


def all_frozen_since(net: Net) -> None:
    other = copy.deepcopy(net)
    lslr = mpp.LSLR(other, 3)
    run(other.requires_grad_(False), lslr=lslr)


def not_reduced(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def switch_before_backward(net: Net) -> None:
    other = copy.deepcopy(net)
    loss = run(other, rematerialize=True).loss
    other.eval()
    loss.backward()


def among_others(net: Net, rank: int) -> None:
    """As in a group of processes that this one is not in, or of which another has more tasks."""

    def all_reduce(ends: Tensor, *_: Any) -> None:
        ends[0] += 1

    here = {"get_rank": lambda _: rank, "all_reduce": all_reduce}
    with mock.patch.multiple(gather.dist, **here):
        run(net, process_group=object())


class WritesIfContiguous(nn.Conv1d):
    """A model whose feature map is contiguous, so that a write reaches it, but not within vmap."""

    def __init__(self) -> None:
        super().__init__(1, 4, 2)

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input.unsqueeze(1))
        h.contiguous().mul_(0.5)
        return h


class Counting(nn.Linear):
    """A model that puts another tensor in a buffer's place."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input)
        self.calls = self.calls + h.detach().mean(0)
        return h


class LastSeen(nn.Linear):
    """A model that keeps in a buffer what it has seen last."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, input: Tensor) -> Tensor:
        h = super().forward(input)
        self.seen = h.detach().mean(0)
        return h


class NoSecond(nn.Sequential):
    """A model whose activation torch can differentiate once."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Hardsigmoid())


class Changing(nn.Linear):
    """A model whose loss grows with every call."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.calls = itertools.count(1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return next(self.calls) * logits.square().mean()


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
    "words": (
        lambda n: run(n, data=[{"x": batch()[0], "how": "plain"}, *batch()[1:3], ["a"]]),
        ValueError,
        ("got ['dict of [(2, 4, 3)]', (2, 4), (2, 5, 3), 'list']", "tasks of y_target"),
    ),
    "another number of tasks in a part": (
        lambda n: run(n, data=[(batch()[0], batch(3)[0]), *batch()[1:]]),
        ValueError,
        ("tasks in dimension 0", "'x_support[0]': 2, 'x_support[1]': 3"),
    ),
    "inner loss by name": (
        lambda n: run(n, inner_loss_fn="mse"),
        TypeError,
        ("inner_loss_fn must be callable", "got 'mse' of type str", "or None for loss_fn"),
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
        lambda n: run(n, aggregate=mpp.MultiStepLoss(2, 10)),
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
        ("cannot be run for several tasks at once", ".item()", "chunk_size=1"),
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
PROCESSES: dict[str, Row] = {
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
}
CUDA_GRAPHS: dict[str, Row] = {
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
    "CUDA graph of a forward that goes on": (
        lambda n: cuda_graph._check_leaves_nothing(partial(count_in, n), n, []),
        RuntimeError,
        ("goes on with what it leaves behind in 'calls'", "leave cuda_graph out"),
    ),
}
OTHER_MODELS: Table = {
    "what vmap computes wrongly": (
        WritesIfContiguous,
        lambda n: run(n, loss=lambda a, b: a.square().mean()),
        RuntimeError,
        ("it computes something else than each alone", "apart", "chunk_size=1"),
    ),
    "a buffer that the forward adds to": (
        Counting,
        lambda n: run(n, loss=lambda a, b: a.square().mean()),
        RuntimeError,
        ("leaves something behind in 'calls'", "pass chunk_size=1"),
    ),
    "a buffer that the forward assigns": (
        LastSeen,
        lambda n: run(n, loss=lambda a, b: a.square().mean()),
        RuntimeError,
        ("assigns the buffers 'seen'", "pass chunk_size=1"),
    ),
    "no second derivative": (
        NoSecond,
        lambda n: run(n, loss=lambda a, b: a.square().mean()),
        RuntimeError,
        ("no second derivative", "hardsigmoid_backward", "second_order=False", "F.relu6(x + 3)"),
    ),
    "no second derivative, one by one": (
        NoSecond,
        lambda n: run(n, loss=lambda a, b: a.square().mean(), chunk_size=1),
        RuntimeError,
        ("no second derivative", "hardsigmoid_backward", "second_order=False"),
    ),
    "something else every time": (
        Changing,
        lambda n: run(n, loss=n.loss),
        RuntimeError,
        ("leaves something behind (in an object, or outside", "pass chunk_size=1"),
    ),
    "something else in the backward": (
        Changing,
        lambda n: run(n, loss=n.loss, rematerialize=True, chunk_size=1).loss.backward(),
        RuntimeError,
        ("run a step's forward again", "something else", "rematerialize=False"),
    ),
    "task batch of a plain BatchNorm": (
        plain,
        run,
        ValueError,
        (
            "layer 'norm' (BatchNorm1d)",
            "convert_norm(model, num_steps)",
            "1, extra_steps",
            "track_running_stats=False",
        ),
    ),
}
TABLE: Table = {
    **done_to(per_step, TASK_BATCHES),
    **done_to(per_step, PROCESSES),
    **done_to(per_step, CUDA_GRAPHS),
    **OTHER_MODELS,
}
test_bad_input = checked(TABLE)
