"""The contenders of the benchmarks: plain MAML and MAML++ in every library."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.benchmark.per_task import Learner, task_loop
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.norm import convert_batchnorm
from mamlpp_ext.schedules import FinalStepLoss, MultiStepLoss
from mamlpp_ext.task_batch import Batch, Loss, TaskBatchLoss, checked_batch
from mamlpp_ext.torch_private import is_batch_norm

GRAPH = "CUDA graph"
# What the meta-batch as a whole is computed by, and with which settings.
BATCHED: dict[str, dict[str, Any]] = {
    "task_batch_loss": {},
    "rematerialised": {"rematerialize": True},
    GRAPH: {"cuda_graph": True},
}
LOOPS = ("bare torch", "higher", "torchopt", *BATCHED)
LEARNERS = ("MAML", "MAML++")


def available_loops(device: str = "cpu") -> list[str]:
    """Returns the names of the loops whose packages are installed and that ``device`` can run."""
    needed = [loop for loop in LOOPS if loop != GRAPH or device.startswith("cuda")]
    return [loop for loop in needed if loop not in ("higher", "torchopt") or find_spec(loop)]


def make_learner(
    model: nn.Module,
    learner: str,
    loop: str,
    *,
    steps: int,
    second_order: bool = True,
    lr: float = 0.1,
    chunk_size: int | None = None,
    loss_fn: Loss = F.cross_entropy,
    multi_step: bool = False,
) -> Learner:
    """Returns plain MAML or MAML++ around a copy of ``model``, ready for a loop.

    Args:
        model: with torch's own norm layers, or none.
        learner: one of ``LEARNERS``.
        loop: one of ``LOOPS``.
        steps: inner steps.
        second_order: whether to differentiate through the inner gradients.
        lr: the inner rate, for MAML++ the one its learned rates start from.
        chunk_size: for ``task_batch_loss``.
        loss_fn: of an output and labels.
        multi_step: whether the target losses of all steps count, in MAML++.
    """
    net, plain = copy.deepcopy(model), learner == "MAML"
    normed = any(is_batch_norm(layer) for layer in net.modules())
    if normed and not plain:
        net = convert_batchnorm(net, steps)
    elif normed and loop in BATCHED:  # nn.BatchNorm's meaning, in a layer that vmap can take
        net = convert_batchnorm(net, 1, extra_steps="last")
    lslr = LSLR(net, steps, lr, learnable=not plain, adapt=["*"] if plain else None)
    every = multi_step and not plain
    aggregate = MultiStepLoss(steps, anneal_epochs=1) if every else FinalStepLoss(steps)
    return Learner(net, lslr, plain, second_order, lr, aggregate, chunk_size, loss_fn)


class MetaIteration:
    """One iteration of meta-training, from clearing the gradients to Adam's step.

    Args:
        loop: one of ``LOOPS``.
        learner: what it trains.
        batch: the tasks.
    """

    def __init__(self, loop: str, learner: Learner, batch: Batch) -> None:
        self.loop, self.learner, self.batch = loop, learner, batch
        # One of them, by the loop.
        self.meta_loss = batch_module(loop, learner) if loop in BATCHED else None
        self.task_loss: Any = None if loop in BATCHED else task_loop(loop, learner)
        learned = [*learner.net.parameters(), *learner.lslr.parameters()]
        self.meta_opt = torch.optim.Adam([p for p in learned if p.requires_grad], lr=1e-3)

    def __call__(self) -> None:
        """Runs it."""
        self.meta_opt.zero_grad()
        self.gradient()
        self.meta_opt.step()

    def gradient(self) -> Tensor:
        """Adds the meta-gradient to the parameters' ``grad``; returns the mean loss over tasks."""
        if self.meta_loss is not None:
            loss: Tensor = self.meta_loss(*self.batch, second_order=self.learner.second_order).loss
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        losses, every = [], checked_batch(self.batch)
        # Plain MAML's loops, too: attention has no second derivative by torch's own choice.
        with twice_differentiable(self.learner.net, second_order=self.learner.second_order):
            for task in every.in_chunks(1):
                loss, cut_off = self.task_loss(*task.single().batch())
                (loss / len(every)).backward()  # type: ignore[no-untyped-call]
                if cut_off:
                    self._hand_over(cut_off)
                losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _hand_over(self, cut_off: tuple[Tensor, ...]) -> None:
        for p, adapted in zip(self.learner.net.parameters(), cut_off, strict=True):
            if adapted.grad is not None:
                p.grad = adapted.grad if p.grad is None else p.grad.add_(adapted.grad)


def batch_module(loop: str, learner: Learner) -> TaskBatchLoss:
    """Returns what computes the mean target loss over tasks."""
    return TaskBatchLoss(
        learner.net,
        learner.lslr,
        learner.loss_fn,
        num_steps=learner.lslr.num_steps,
        aggregate=learner.aggregate,
        chunk_size=learner.chunk_size,
        all_step_losses=False,
        **BATCHED[loop],
    )
