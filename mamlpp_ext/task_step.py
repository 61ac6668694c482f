"""One inner step of a chunk of tasks: support gradient, update, target loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mamlpp_ext.steps import Tape, at_step, of_order

if TYPE_CHECKING:
    from mamlpp_ext.task_loop import TaskLoop

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Step:
    """One inner step of a chunk of tasks, a pure function of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic among the outputs.
    """

    def __init__(
        self, inner: TaskLoop, step: int, counts: bool, data: tuple[Tensor, ...], single: bool
    ) -> None:
        self.inner, self.step, self.counts, self.data = inner, step, counts, data
        self.single, self.again = single, False
        self.mode = self._mode()
        self.places: list[tuple[nn.Module, int]] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors, the target losses [T], the logits and the statistics.

        For a single task they are without the dimension T.
        """
        self.check_mode()
        self.places = []
        adapted = dict(zip(self.inner.initial, tensors, strict=True))
        grads, *seen = self.gradients(adapted)
        updated = self.inner.lslr.update(adapted, dict(zip(adapted, grads, strict=True)), self.step)
        # A step that is rebuilt for the gradient needs no target loss without one.
        again, self.again = self.again, True
        if self.counts or (self.inner.all_step_losses and not again):
            losses, logits, *seen_later = self.targets(updated)
        else:
            losses, logits, seen_later = *self.no_targets(), []
        return *updated.values(), losses, logits, *seen, *seen_later

    def gradients(self, adapted: Params) -> Any:
        """Returns the support loss's gradients in a list, then the statistics of its forward."""
        tracked = torch.is_grad_enabled()
        if not tracked:  # evaluation, or a step whose graph is rebuilt later
            adapted = {name: t.detach().requires_grad_() for name, t in adapted.items()}
        x, y, *_ = self.data
        second_order = tracked and self.inner.second_order
        with torch.enable_grad():
            losses, (_, seen) = self._forward(adapted, x, y, second_order)
            # No loss depends on another task's weights: the sum's gradient is each one's.
            grads = torch.autograd.grad(
                losses.sum(), [*adapted.values()], create_graph=second_order, allow_unused=True
            )
        return [*grads], *seen

    def targets(self, updated: Params) -> Any:
        """Returns the target losses, the logits, then the statistics of their forward."""
        *_, x, y = self.data
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.counts):
            losses, (logits, seen) = self._forward(updated, x, y, False)
        return losses, logits.detach(), *seen

    def no_targets(self) -> tuple[Tensor, Tensor]:
        """Returns what stands for target losses and logits that are not computed."""
        shape = () if self.single else (len(self.data[0]),)
        nothing = self.inner.lslr.rates.new_full(shape, math.nan)
        return nothing, nothing

    def _forward(
        self, adapted: Params, x: Tensor, y: Tensor, second_order: bool
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        model = self.inner.model
        with at_step(model, self.step), of_order(model, second_order):
            if self.single:
                return self._loss(adapted, x, y)
            return vmap(self._loss, randomness="different")(adapted, x, y)

    def _loss(
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for layer in self.inner.layers:
            layer.inner_step.tape = tape
        try:
            placed = {place: adapted[name] for place, name in self.inner.places.items()}
            logits = functional_call(self.inner.model, placed, (x,), tie_weights=False)
            loss = self.inner.loss_fn(logits, y)
        finally:
            for layer in self.inner.layers:
                layer.inner_step.tape = None
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

    def check_mode(self) -> None:
        """Refuses to rebuild a step that would compute something else."""
        if self._mode() != self.mode:
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )

    def _mode(self) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        """What decides how the layers compute, besides their tensors."""
        frozen = tuple(layer.inner_step.frozen for layer in self.inner.layers)
        return tuple(module.training for module in self.inner.model.modules()), frozen
