"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mamlpp_ext.steps import BatchStatistics
from mamlpp_ext.task_batch.adapted_model import AdaptedModel, Params
from mamlpp_ext.task_batch.chunks import differentiated, distinct
from mamlpp_ext.task_batch.rematerialize import OutputMemory, rematerialized
from mamlpp_ext.task_batch.settings import Settings
from mamlpp_ext.task_batch.step import TaskStep


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other.

    Args:
        model: what is adapted.
        settings: how.
        batch: all tasks.
    """

    def __init__(self, model: AdaptedModel, settings: Settings, batch: tuple[Tensor, ...]) -> None:
        self.model, self.settings = model, settings
        self.counted = settings.counted_steps()
        self.early = settings.target_gradients_early and _gains_by_early_gradients(model, batch)
        rates = [p for p in model.lslr.parameters() if p.requires_grad]
        self.learned = [*model.learned_outside(), *rates, *settings.learned()]
        # Read in eval mode; in the list, changing them before the backward is an error.
        read = [b for m in model.modules if not m.training for b in m.buffers(recurse=False)]
        self.captured = distinct([*self.learned, *read])

    def run(self, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, BatchStatistics]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and statistics."""
        single = len(data[0]) == 1  # then vmap would only cost
        adapted = self._initial(len(data[0]))
        if single:
            data = tuple(tensor[0] for tensor in data)
        losses: list[Tensor | None] = []
        statistics: BatchStatistics = []
        memory = self._memory(adapted)
        captured = [*self.captured, *(tensor for tensor in data if tensor.requires_grad)]
        for step, counts in enumerate(self.counted):
            # The last step's graph is kept: the backward begins with it.
            last = step == len(self.counted) - 1
            kept_in = None if last else memory
            one_step = TaskStep(self.model, self.settings, step, data, single)
            if memory is None or not self.settings.second_order:
                outputs = one_step.adapt(*adapted.values())  # inner gradients have no graph
            else:
                outputs = rematerialized(one_step.adapt, (*adapted.values(),), captured, kept_in)
            adapted = dict(zip(adapted, outputs, strict=False))
            statistics += one_step.statistics_of(outputs[len(adapted) :])
            if not (counts or last or self.settings.all_step_losses):
                losses.append(None)
                continue
            inputs = (*adapted.values(),)
            if not (counts and torch.is_grad_enabled()):
                with torch.no_grad():
                    outputs = one_step.target(*inputs)
            else:
                outputs = self._target(one_step, inputs, captured, memory, kept_in)
            statistics += one_step.statistics_of(outputs[2:])
            loss, logits = (t.unsqueeze(0) for t in outputs[:2]) if single else outputs[:2]
            losses.append(loss)
        if memory is not None:  # or they hold the graph of rebuilt steps, and all of the memory
            statistics = [(at, m.detach().clone(), v.detach().clone()) for at, m, v in statistics]
            memory.blocks.clear()  # from now on each lives as long as what it holds
        nothing = torch.full_like(loss, math.nan)
        found = [nothing if loss is None else loss for loss in losses]
        return torch.stack(found, dim=1), logits, statistics

    def _initial(self, tasks: int) -> Params:
        """Returns the initial weights for each task; for one alone without T.

        Never the parameters themselves: what ``loss_fn`` reads of the model is not adapted.
        """
        initial = self.model.initial
        if tasks == 1:
            return {name: p.view_as(p) for name, p in initial.items()}
        return {name: p.expand(tasks, *p.shape) for name, p in initial.items()}

    def _target(
        self,
        one_step: TaskStep,
        inputs: tuple[Tensor, ...],
        captured: list[Tensor],
        memory: OutputMemory | None,
        kept_in: OutputMemory | None,
    ) -> tuple[Tensor, ...]:
        """Returns the step's target losses, whose gradients are asked for, logits, statistics."""
        if self.early:
            keep = None if memory is None else memory.put
            target = partial(one_step.target, differentiated_once=True)
            return differentiated(target, inputs, captured, keep)
        if memory is not None:
            return rematerialized(one_step.target, inputs, captured, kept_in)
        return one_step.target(*inputs)

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

    def learned_from(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Returns every tensor that the meta-loss is differentiated by."""
        initial = self.model.initial.values()
        return [t for t in (*initial, *self.learned, *batch) if t.requires_grad]


def _gains_by_early_gradients(model: AdaptedModel, batch: tuple[Tensor, ...]) -> bool:
    """Returns whether gradients of target losses may be kept in place of the losses' graphs."""
    initial = list(model.initial.values())
    others = [t for t in (*model.learned_outside(), *batch) if t.requires_grad]
    kind = initial[0].device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if half or any(t.dtype == torch.float16 for t in (*initial, *others)):
        return False  # they would be taken before the meta-loss is scaled, and underflow
    # Each step keeps those by the others, too.
    return sum(t.numel() for t in others) <= sum(t.numel() for t in initial)
