"""One inner step of a chunk of tasks."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mamlpp_ext.kernels import FastKernels, worth_it
from mamlpp_ext.known_gradients import KnownGradients
from mamlpp_ext.layout import in_default_layout
from mamlpp_ext.steps import Tape, of_order, placed_at

if TYPE_CHECKING:
    from mamlpp_ext.task_loop import Params, TaskLoop


class TaskStep:
    """One inner step of a chunk of tasks: pure functions of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic that the last call returned.
        known: of a step that will be rebuilt, what need not be computed again.
    """

    def __init__(self, inner: TaskLoop, step: int, data: tuple[Tensor, ...], single: bool) -> None:
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
            learning = self.inner.adapting
            adapted = {
                name: t.detach().requires_grad_(name in learning) for name, t in adapted.items()
            }
        clocks, order = self.inner.clocks, tracked and self.inner.second_order
        kernels = FastKernels(self.inner.second_order, self.known)
        with placed_at(clocks, self.step), of_order(clocks, order):
            with torch.enable_grad():
                losses, (_, seen) = self._forward(adapted, self.support, kernels)
                grads = self._gradients(losses, adapted, order)
            updated = self.inner.lslr.update(adapted, grads, self.step)
        return *updated.values(), *seen

    def target(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the losses [T], the logits [T, Q, ...] and the statistics."""
        self._begin()
        updated = dict(zip(self.inner.initial, tensors, strict=True))
        order = torch.is_grad_enabled() and self.inner.second_order and not self.inner.at_once
        with placed_at(self.inner.clocks, self.step), of_order(self.inner.clocks, order):
            losses, (logits, seen) = self._forward(updated, self.queried, FastKernels(order))
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
        wanted = [adapted[name] for name in self.inner.adapting]  # not those frozen since
        with nullcontext() if self.known is None else self.known.in_the_inner_backward():
            found = torch.autograd.grad(
                losses.sum(), wanted, create_graph=with_graph, allow_unused=True
            )
        return {**dict.fromkeys(adapted), **dict(zip(self.inner.adapting, found, strict=True))}

    def _forward(
        self, adapted: Params, data: tuple[Tensor, ...], kernels: FastKernels
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        loss = partial(self._loss, kernels if self.quick else nullcontext())
        if self.single:
            return loss(adapted, *data)
        try:
            return vmap(loss, randomness="different")(adapted, *data)
        except RuntimeError as error:
            if "vmap" not in str(error) and "Batching rule" not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nThe model or loss_fn does something that torch.func.vmap cannot run "
                "for several tasks at once; pass chunk_size=1 to run them one by one"
            ) from error

    def _loss(
        self, kernels: Any, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for clock in self.inner.clocks:
            clock.tape = tape
        try:
            placed = {place: adapted[name] for place, name in self.inner.places.items()}
            with kernels:
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
