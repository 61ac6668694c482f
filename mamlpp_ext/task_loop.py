"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mamlpp_ext.adapted import listing
from mamlpp_ext.chunks import differentiated, distinct
from mamlpp_ext.kernels import worth_it
from mamlpp_ext.known_gradients import KnownGradients
from mamlpp_ext.layout import channels_last
from mamlpp_ext.lslr import LSLR, checked_lslr
from mamlpp_ext.rematerialize import Shelf, rematerialized
from mamlpp_ext.steps import Tape, checked_clocks
from mamlpp_ext.task_step import TaskStep

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other.

    ``at_once`` says that the gradients of target losses may be taken at once: each step's have the
    same weight for all tasks, and the meta-loss will be differentiated no more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        lslr: LSLR,
        loss_fn: Loss,
        *,
        num_steps: int,
        second_order: bool,
        rematerialize: bool,
        all_step_losses: bool,
        at_once: bool,
        batch: tuple[Tensor, ...],
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, checked_lslr(lslr), loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.all_step_losses = all_step_losses
        self.initial = lslr.parameters_of(model)
        self.adapting = [name for name, p in self.initial.items() if p.requires_grad]
        if not self.adapting:
            raise ValueError(
                f"every parameter that this LSLR adapts ({listing(list(self.initial))}) is frozen; "
                "call requires_grad_(True) on them, or build an LSLR with another adapt"
            )
        outer = [p for name, p in model.named_parameters() if name not in self.initial]
        of_loss = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()
        self.learned = [p for p in (*outer, *lslr.parameters(), *of_loss) if p.requires_grad]
        # Read in eval mode; in the list, changing them before the backward is an error.
        read = [b for m in model.modules() if not m.training for b in m.buffers(recurse=False)]
        self.captured = distinct([*self.learned, *read])
        read_too = [t for t in (*outer, *batch) if t.requires_grad]
        self.at_once = at_once and self._gains_by_differentiating(read_too)
        self.clocks = checked_clocks(model, num_steps - 1)
        self.modules = list(model.modules())
        self.places = _places(model, self.initial)

    def _gains_by_differentiating(self, others: list[Tensor]) -> bool:
        """Returns whether target gradients by what is adapted and by ``others`` may be kept."""
        tensors = [*self.initial.values(), *others]
        kind = tensors[0].device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        if half or any(t.dtype == torch.float16 for t in tensors):
            return False  # they would be taken before the meta-loss is scaled, and underflow
        # Each step keeps those by the others, too.
        return sum(t.numel() for t in others) <= sum(t.numel() for t in self.initial.values())

    def learned_from(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Returns every tensor that the meta-loss is differentiated by."""
        return [t for t in (*self.initial.values(), *self.learned, *batch) if t.requires_grad]

    def run(self, data: tuple[Tensor, ...], counted: list[bool]) -> tuple[Tensor, Tensor, Tape]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and the tape."""
        single = len(data[0]) == 1  # then vmap would only cost
        adapted = self._initial_of_tasks(data[0])
        if single:
            data = tuple(tensor[0] for tensor in data)
        losses: list[Tensor | None] = []
        tape = Tape()
        memory = self._memory(adapted, counted)
        captured = [*self.captured, *(tensor for tensor in data if tensor.requires_grad)]
        for step, counts in enumerate(counted):
            # The last step's graph is kept: the backward begins with it.
            last = step == len(counted) - 1
            shelf = None if last else memory
            one_step = TaskStep(self, step, data, single)
            if memory is None or not self.second_order:  # then inner gradients have no graph
                outputs = one_step.adapt(*adapted.values())
            else:
                one_step.known = None if shelf is None else KnownGradients(shelf.put)
                outputs = rematerialized(one_step.adapt, (*adapted.values(),), captured, shelf)
            adapted = dict(zip(adapted, outputs, strict=False))
            tape += one_step.tape_of(outputs[len(adapted) :])
            if not (counts or last or self.all_step_losses):
                losses.append(None)
                continue
            inputs = (*adapted.values(),)
            if not (counts and torch.is_grad_enabled()):
                with torch.no_grad():
                    outputs = one_step.target(*inputs)
            else:
                outputs = self._target(one_step, inputs, captured, memory, shelf)
            tape += one_step.tape_of(outputs[2:])
            loss, logits = (t.unsqueeze(0) for t in outputs[:2]) if single else outputs[:2]
            losses.append(loss)
        if memory is not None:  # or they hold the graph of rebuilt steps, and all of the memory
            tape = [
                (place, mean.detach().clone(), var.detach().clone()) for place, mean, var in tape
            ]
            memory.blocks.clear()  # from now on each lives as long as what it holds
        nothing = torch.full_like(loss, math.nan)
        found = [nothing if loss is None else loss for loss in losses]
        return torch.stack(found, dim=1), logits, tape

    def _initial_of_tasks(self, x: Tensor) -> Params:
        """Returns the initial weights for each task of ``x``; for one alone without T.

        Never the parameters themselves: what ``loss_fn`` reads of the model is not adapted.
        """
        tasks = len(x)
        if tasks == 1:
            return {name: p.view_as(p) for name, p in self.initial.items()}
        adapted: Params = dict(self.initial)
        if worth_it(x, within=True):
            # Once, instead of every task's own in every convolution.
            adapted = {
                name: channels_last(p) if p.dim() == 4 and p.is_cpu else p
                for name, p in adapted.items()
            }
        return {name: p.expand(tasks, *p.shape) for name, p in adapted.items()}

    def _target(
        self,
        one_step: TaskStep,
        inputs: tuple[Tensor, ...],
        captured: list[Tensor],
        memory: Shelf | None,
        shelf: Shelf | None,
    ) -> tuple[Tensor, ...]:
        """Returns the step's target losses, whose gradients are asked for, logits, statistics."""
        if self.at_once:
            keep = None if memory is None else memory.put
            return differentiated(one_step.target, inputs, captured, keep)
        if memory is not None:
            return rematerialized(one_step.target, inputs, captured, shelf)
        return one_step.target(*inputs)

    def _memory(self, adapted: Params, counted: list[bool]) -> Shelf | None:
        """Returns where what is kept of steps that will be rebuilt lies; None if none will be."""
        if not (self.rematerialize and torch.is_grad_enabled()):
            return None
        # Weights of all steps but the last, and nearly as much of their gradients by the support
        # loss, and as much by each target loss; a tenth for statistics and what else is learned.
        times = 2 * self.second_order * (len(counted) - 1) + self.at_once * sum(counted)
        return Shelf(round(1.1 * times * sum(tensor.numel() for tensor in adapted.values())))


def _places(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns every place that holds one of ``params``, and under which name it goes.

    Left to ``functional_call``, tied weights are put back wrongly where a module stands in two
    places (torch 2.13): the second name finds the replacement and takes it for the original.
    """
    names = {id(p): name for name, p in params.items()}
    return {
        f"{path}.{key}" if path else key: names[id(p)]
        for path, module in model.named_modules()  # a shared module comes once
        for key, p in module._parameters.items()
        if id(p) in names
    }
