"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mamlpp_ext.chunks import differentiated
from mamlpp_ext.kernels import FastKernels, worth_it
from mamlpp_ext.known_gradients import KnownGradients
from mamlpp_ext.layout import channels_last, in_default_layout
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.rematerialize import Shelf, rematerialized
from mamlpp_ext.steps import Tape, checked_clocks, of_order, placed_at

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other.

    ``equal_shares`` says that a step's target losses enter the meta-loss with one weight for all
    tasks, whose gradient is taken once: so that of the target losses is taken at once.
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
        equal_shares: bool,
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, lslr, loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.all_step_losses, self.equal_shares = all_step_losses, equal_shares
        self.initial = lslr.parameters_of(model)
        outer = [p for name, p in model.named_parameters() if name not in self.initial]
        self.learned = [p for p in (*outer, *lslr.parameters()) if p.requires_grad]
        # Read in eval mode; in the list, changing them before the backward is an error.
        read = [b for m in model.modules() if not m.training for b in m.buffers(recurse=False)]
        self.captured = [*self.learned, *read]
        self.clocks = checked_clocks(model, num_steps - 1)
        self.modules = list(model.modules())
        self.places = _places(model, self.initial)

    def learned_from(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Returns every tensor that the meta-loss is differentiated by."""
        return [t for t in (*self.initial.values(), *self.learned, *batch) if t.requires_grad]

    def run(self, data: tuple[Tensor, ...], counted: list[bool]) -> tuple[Tensor, Tensor, Tape]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and the tape."""
        tasks = len(data[0])
        single = tasks == 1  # then vmap would only cost
        adapted: Params = dict(self.initial)
        if single:
            data = tuple(tensor[0] for tensor in data)
        else:
            if worth_it(data[0], within=True):
                # Once, instead of every task's own in every convolution.
                adapted = {
                    name: channels_last(p) if p.dim() == 4 and p.is_cpu else p
                    for name, p in adapted.items()
                }
            adapted = {name: p.expand(tasks, *p.shape) for name, p in adapted.items()}
        losses: list[Tensor | None] = []
        tape = Tape()
        memory = self._memory(adapted, len(counted) - 1)
        captured = [*self.captured, *(tensor for tensor in data if tensor.requires_grad)]
        for step, counts in enumerate(counted):
            # The last step's graph is kept: the backward begins with it.
            shelf = None if step == len(counted) - 1 else memory
            one_step = _Step(self, step, data, single)
            if memory is None:
                outputs = one_step.adapt(*adapted.values())
            else:
                if shelf is not None and self.second_order:
                    one_step.known = KnownGradients(shelf.put)
                outputs = rematerialized(one_step.adapt, (*adapted.values(),), captured, shelf)
            adapted = dict(zip(adapted, outputs, strict=False))
            tape += one_step.tape_of(outputs[len(adapted) :])
            if not (counts or self.all_step_losses):
                losses.append(None)
                continue
            inputs = (*adapted.values(),)
            with torch.set_grad_enabled(torch.is_grad_enabled() and counts):
                if torch.is_grad_enabled() and self.equal_shares:
                    keep = None if memory is None else memory.put
                    outputs = differentiated(one_step.target, inputs, captured, keep)
                elif torch.is_grad_enabled() and memory is not None:
                    outputs = rematerialized(one_step.target, inputs, captured, shelf)
                else:
                    outputs = one_step.target(*inputs)
            tape += one_step.tape_of(outputs[2:])
            loss, logits = (t.unsqueeze(0) for t in outputs[:2]) if single else outputs[:2]
            losses.append(loss)
        nothing = torch.full_like(loss, math.nan, requires_grad=False)
        found = [nothing if loss is None else loss for loss in losses]
        return torch.stack(found, dim=1), logits, tape

    def _memory(self, adapted: Params, steps: int) -> Shelf | None:
        """Returns where what is kept of steps that will be rebuilt lies; None if none will be."""
        if not (self.rematerialize and torch.is_grad_enabled()):
            return None
        weights = sum(tensor.numel() for tensor in adapted.values())
        # A step's weights, and nearly as much of their gradients by the support and target loss.
        return Shelf((1 + self.second_order + self.equal_shares) * weights * steps)


class _Step:
    """One inner step of a chunk of tasks: pure functions of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic that the last call returned.
        known: of a step that will be rebuilt, what need not be computed again.
    """

    def __init__(
        self, inner: TaskLoop, step: int, data: tuple[Tensor, ...], single: bool
    ) -> None:
        self.inner, self.step, self.single = inner, step, single
        self.support, self.queried = data[:2], data[2:]
        self.quick = worth_it(data[0], within=not single)
        self.mode = self._mode()
        self.places: list[tuple[nn.Module, int]] = []
        self.known: KnownGradients | None = None

    def adapt(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors and the statistics.

        For a single task they are without the dimension T, here and below.
        """
        self._begin()
        adapted = dict(zip(self.inner.initial, tensors, strict=True))
        tracked = torch.is_grad_enabled()
        if not tracked:  # evaluation, or a step whose graph is rebuilt later
            adapted = {name: t.detach().requires_grad_() for name, t in adapted.items()}
        clocks, order = self.inner.clocks, tracked and self.inner.second_order
        with placed_at(clocks, self.step), of_order(clocks, order):
            with torch.enable_grad():
                losses, (_, seen) = self._forward(adapted, self.support, self.known)
                grads = self._gradients(losses, adapted, order)
            updated = self.inner.lslr.update(adapted, grads, self.step)
        return *updated.values(), *seen

    def target(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the losses [T], the logits [T, Q, ...] and the statistics."""
        self._begin()
        updated = dict(zip(self.inner.initial, tensors, strict=True))
        order = torch.is_grad_enabled() and self.inner.second_order
        with placed_at(self.inner.clocks, self.step), of_order(self.inner.clocks, order):
            losses, (logits, seen) = self._forward(updated, self.queried)
        return losses, logits.detach(), *seen

    def tape_of(self, statistics: tuple[Tensor, ...]) -> Tape:
        """Returns the statistics of the last call, of T tasks each, with their places."""
        of_all = [t.unsqueeze(0) for t in statistics] if self.single else statistics
        return [*zip(self.places, of_all[::2], of_all[1::2], strict=True)]

    def _begin(self) -> None:
        if self._mode() != self.mode:  # rebuilding the step would compute something else
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )
        self.places = []
        if self.known is not None:
            self.known.begin()

    def _gradients(
        self, losses: Tensor, adapted: Params, with_graph: bool
    ) -> dict[str, Tensor | None]:
        # No loss depends on another task's weights: the sum's gradient is each one's.
        with nullcontext() if self.known is None else self.known.in_the_inner_backward():
            found = torch.autograd.grad(
                losses.sum(), [*adapted.values()], create_graph=with_graph, allow_unused=True
            )
        return dict(zip(adapted, found, strict=True))

    def _forward(
        self, adapted: Params, data: tuple[Tensor, ...], known: KnownGradients | None = None
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        loss = partial(self._loss, known)
        if self.single:
            return loss(adapted, *data)
        return vmap(loss, randomness="different")(adapted, *data)

    def _loss(
        self, known: KnownGradients | None, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for clock in self.inner.clocks:
            clock.tape = tape
        try:
            placed = {place: adapted[name] for place, name in self.inner.places.items()}
            with FastKernels(self.inner.second_order, known) if self.quick else nullcontext():
                logits = functional_call(self.inner.model, placed, (x,), tie_weights=False)
            if self.quick:
                logits = in_default_layout(logits, x)
            loss = self.inner.loss_fn(logits, y)
        finally:
            for clock in self.inner.clocks:
                clock.tape = None
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise (ValueError if isinstance(loss, Tensor) else TypeError)(
                f"loss_fn must return one 0-dim tensor for a task, got {got}; reduce it, e.g. with "
                "reduction='mean'"
            )
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model must return one tensor, got {type(logits).__name__}; wrap it in a "
                "module that picks the logits out"
            )
        self.places += [place for place, _, _ in tape]
        return loss, (logits, [value for _, *values in tape for value in values])

    def _mode(self) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        """What decides how the layers compute, besides their tensors."""
        frozen = tuple(clock.frozen for clock in self.inner.clocks)
        return tuple(module.training for module in self.inner.modules), frozen


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
