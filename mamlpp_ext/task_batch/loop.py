"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_ext.steps import BatchStatistics
from mamlpp_ext.task_batch.adapted_model import AdaptedModel, Params
from mamlpp_ext.task_batch.batch import Tasks
from mamlpp_ext.task_batch.chunks import differentiated, distinct
from mamlpp_ext.task_batch.rematerialize import OutputMemory, rematerialized
from mamlpp_ext.task_batch.replay import replayed
from mamlpp_ext.task_batch.settings import Settings
from mamlpp_ext.task_batch.step import TaskStep, Way
from mamlpp_ext.task_batch.ways import alone


class Outcome(NamedTuple):
    """What adapting to some tasks has come to.

    Attributes:
        step_losses: [T, num_steps].
        outputs: the tensors of the last output, each [T, Q, ...].
        rebuild: makes an output of such tensors.
        statistics: what the layers measured.
    """

    step_losses: Tensor
    outputs: list[Tensor]
    rebuild: Callable[[Sequence[Any]], Any]
    statistics: BatchStatistics


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other.

    Args:
        model: what is adapted.
        settings: how.
        tasks: all of them.
    """

    def __init__(self, model: AdaptedModel, settings: Settings, tasks: Tasks) -> None:
        self.model, self.settings = model, settings
        self.counted = settings.counted_steps()
        read = [t for t in tasks.tensors if t.requires_grad]
        self.early = settings.target_gradients_early and _gains_by_early_gradients(model, read)
        rates = [p for p in model.lslr.parameters() if p.requires_grad]
        self.learned = [*model.learned_outside(), *rates, *settings.learned()]
        # Read in eval mode; in the list, changing them before the backward is an error.
        buffers = [b for m in model.modules if not m.training for b in m.buffers(recurse=False)]
        self.captured = distinct([*self.learned, *buffers])

    def run(self, tasks: Tasks, way: Way) -> Outcome:
        """Adapts to some tasks, ``alone`` to one."""
        adapted = self.model.initial_of(len(tasks), alone=way is alone)
        if way is alone:
            tasks = tasks.single()
        losses: list[Tensor | None] = []
        statistics: BatchStatistics = []
        memory = self._memory(adapted)
        for step, counts in enumerate(self.counted):
            # The last step's graph is kept: the backward begins with it.
            last = step == len(self.counted) - 1
            kept_in = None if last else memory
            one_step = TaskStep(self.model, self.settings, step, tasks, way)
            updated, seen = self._adapt(one_step, adapted, memory, kept_in)
            adapted = dict(zip(adapted, updated, strict=True))
            statistics += seen
            if not (counts or last or self.settings.all_step_losses):
                losses.append(None)
                continue
            loss, seen, outputs = self._target(one_step, adapted, counts, memory, kept_in)
            statistics += seen
            losses.append(loss)
        if memory is not None:  # or they hold the graph of rebuilt steps, and all of the memory
            statistics = [(at, m.detach().clone(), v.detach().clone()) for at, m, v in statistics]
            memory.blocks.clear()  # from now on each lives as long as what it holds
        nothing = torch.full_like(loss, math.nan)
        found = torch.stack([nothing if loss is None else loss for loss in losses], dim=1)
        return Outcome(found, outputs, one_step.rebuild, statistics)

    def _adapt(
        self,
        one_step: TaskStep,
        adapted: Params,
        memory: OutputMemory | None,
        kept_in: OutputMemory | None,
    ) -> tuple[tuple[Tensor, ...], BatchStatistics]:
        """Returns the updated tensors and the statistics."""
        inputs = (*adapted.values(),)
        if memory is None or not self.settings.second_order:
            found = one_step.adapt(*inputs)  # inner gradients have no graph
        else:
            captured = self._captured_by(one_step)
            adapt = replayed(one_step.adapt, self.model.modules)
            found = rematerialized(adapt, inputs, captured, kept_in)
        return found[: len(inputs)], placed(one_step, found[len(inputs) :])

    def _target(
        self,
        one_step: TaskStep,
        adapted: Params,
        counts: bool,
        memory: OutputMemory | None,
        kept_in: OutputMemory | None,
    ) -> tuple[Tensor, BatchStatistics, list[Tensor]]:
        """Returns the step's target losses [T], the statistics and the tensors of the outputs."""
        inputs, captured = (*adapted.values(),), self._captured_by(one_step)
        if not (counts and torch.is_grad_enabled()):
            found = _without_graph(one_step, inputs)
        elif self.early:
            keep = None if memory is None else memory.put
            once = partial(one_step.target, differentiated_once=True)
            found = differentiated(once, inputs, captured, keep)
        elif memory is not None:
            target = replayed(one_step.target, self.model.modules)
            found = rematerialized(target, inputs, captured, kept_in)
        else:
            found = one_step.target(*inputs)
        count = 1 + 2 * len(one_step.places)
        statistics = placed(one_step, found[1:count])
        loss, *outputs = (
            t.unsqueeze(0) if one_step.way is alone else t for t in (found[0], *found[count:])
        )
        return loss, statistics, outputs

    def _captured_by(self, one_step: TaskStep) -> list[Tensor]:
        return [*self.captured, *(t for t in one_step.tasks.tensors if t.requires_grad)]

    def _memory(self, adapted: Params) -> OutputMemory | None:
        """Returns where what is kept of steps that will be rebuilt lies; None if none will be."""
        if not (self.settings.rematerialize and torch.is_grad_enabled()):
            return None
        # Weights of all steps but the last, and as much by each target loss; a tenth for statistics
        # and what else is learned.
        times = self.settings.second_order * (len(self.counted) - 1) + self.early * sum(
            self.counted
        )
        return OutputMemory(round(1.1 * times * sum(tensor.numel() for tensor in adapted.values())))

    def learned_from(self, tasks: Tasks) -> list[Tensor]:
        """Returns every tensor that the meta-loss is differentiated by."""
        initial = self.model.initial.values()
        return [t for t in (*initial, *self.learned, *tasks.tensors) if t.requires_grad]


def _without_graph(one_step: TaskStep, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns what a target forward comes to whose loss does not count."""
    try:
        with torch.no_grad():
            return one_step.target(*inputs)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad():  # the forward itself differentiates
        return tuple(t.detach() for t in one_step.target(*inputs))


def placed(one_step: TaskStep, statistics: tuple[Tensor, ...]) -> BatchStatistics:
    """Returns what was measured, of T tasks each, with its layer and row."""
    of_all = [t.unsqueeze(0) for t in statistics] if one_step.way is alone else statistics
    return [*zip(one_step.places, of_all[::2], of_all[1::2], strict=True)]


def _gains_by_early_gradients(model: AdaptedModel, read: list[Tensor]) -> bool:
    """Returns whether gradients of target losses may be kept in place of the losses' graphs."""
    initial = list(model.initial.values())
    others = [*model.learned_outside(), *read]
    kind = initial[0].device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if half or any(t.dtype == torch.float16 for t in (*initial, *others)):
        return False  # they would be taken before the meta-loss is scaled, and underflow
    # Each step keeps those by the others, too.
    return sum(t.numel() for t in others) <= sum(t.numel() for t in initial)
