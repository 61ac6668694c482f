"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mamlpp_ext.kernels import FastKernels, worth_it
from mamlpp_ext.known_gradients import KnownGradients
from mamlpp_ext.layout import channels_last, in_default_layout
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.rematerialize import Shelf, rematerialized
from mamlpp_ext.steps import Tape, checked_clocks, of_order, placed_at

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other."""

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
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, lslr, loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.all_step_losses = all_step_losses
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
        losses, tape = [], Tape()
        weights = sum(tensor.numel() for tensor in adapted.values())
        # A step's weights, and nearly as much of their gradients.
        each = 2 * weights if self.second_order else weights
        shelf = Shelf(each * (len(counted) - 1)) if self.rematerialize else None
        for step, counts in enumerate(counted):
            one_step = _Step(self, step, counts, data, single)
            if shelf is not None and torch.is_grad_enabled():
                learned = [tensor for tensor in data if tensor.requires_grad]
                captured = [*self.captured, *learned]
                # The last step's graph is kept: the backward begins with it.
                to = None if step == len(counted) - 1 else shelf
                if to is not None and self.second_order:
                    one_step.known = KnownGradients(to.put)
                outputs = rematerialized(one_step, tuple(adapted.values()), captured, to)
            else:
                outputs = one_step(*adapted.values())
            adapted = dict(zip(adapted, outputs, strict=False))
            rest = outputs[len(adapted) :]
            loss, logits, *statistics = (t.unsqueeze(0) for t in rest) if single else rest
            losses.append(loss)
            tape += zip(one_step.places, statistics[::2], statistics[1::2], strict=True)
        return torch.stack(losses, dim=1), logits, tape


class _Step:
    """One inner step of a chunk of tasks, a pure function of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic among the outputs.
        known: of a step that will be rebuilt, what need not be computed again.
    """

    def __init__(
        self, inner: TaskLoop, step: int, counts: bool, data: tuple[Tensor, ...], single: bool
    ) -> None:
        self.inner, self.step, self.counts, self.data = inner, step, counts, data
        self.single, self.again = single, False
        self.quick = worth_it(data[0], within=not single)
        self.mode = self._mode()
        self.places: list[tuple[nn.Module, int]] = []
        self.known: KnownGradients | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors, the target losses [T], the logits and the statistics.

        For a single task they are without the dimension T.
        """
        self._begin()
        adapted = dict(zip(self.inner.initial, tensors, strict=True))
        x_support, y_support, x_target, y_target = self.data
        tracked = torch.is_grad_enabled()
        if not tracked:  # evaluation, or a step whose graph is rebuilt later
            adapted = {name: t.detach().requires_grad_() for name, t in adapted.items()}
        clocks, order = self.inner.clocks, tracked and self.inner.second_order
        with placed_at(clocks, self.step), of_order(clocks, order):
            with torch.enable_grad():
                losses, (_, seen) = self._forward(adapted, x_support, y_support)
                grads = self._gradients(losses, adapted, order)
            updated = self.inner.lslr.update(adapted, grads, self.step)
            # A step that is rebuilt for the gradient needs no target loss without one.
            again, self.again = self.again, True
            if not self.counts and (again or not self.inner.all_step_losses):
                nothing = torch.full_like(losses, math.nan)
                return *updated.values(), nothing, nothing, *seen
            with torch.set_grad_enabled(tracked and self.counts):
                losses, (logits, seen_later) = self._forward(updated, x_target, y_target)
        return *updated.values(), losses, logits.detach(), *seen, *seen_later

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
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        if self.single:
            return self._loss(adapted, x, y)
        return vmap(self._loss, randomness="different")(adapted, x, y)

    def _loss(
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for clock in self.inner.clocks:
            clock.tape = tape
        try:
            placed = {place: adapted[name] for place, name in self.inner.places.items()}
            with FastKernels(self.inner.second_order, self.known) if self.quick else nullcontext():
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
