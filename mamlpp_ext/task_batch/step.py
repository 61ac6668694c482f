"""One inner step of a chunk of tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from mamlpp_ext.steps import BatchStatistics, fixed_at, with_order
from mamlpp_ext.task_batch.adapted_model import AdaptedModel, Params
from mamlpp_ext.task_batch.settings import Settings


class TaskStep:
    """One inner step of a chunk of tasks: pure functions of the adapted tensors.

    Args:
        model: what is adapted.
        settings: how.
        step: the inner step, 0-based.
        data: support inputs and labels, target inputs and labels.
        single: whether that is one task, here and below without the dimension T.

    Attributes:
        places: the layer and row of each batch statistic that the last call returned.
    """

    def __init__(
        self,
        model: AdaptedModel,
        settings: Settings,
        step: int,
        data: tuple[Tensor, ...],
        single: bool,
    ) -> None:
        self.model, self.settings, self.step, self.single = model, settings, step, single
        self.support, self.queried = data[:2], data[2:]
        self.mode = model.mode()
        self.places: list[tuple[nn.Module, int]] = []

    def adapt(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors and the statistics."""
        self._begin()
        adapted = dict(zip(self.model.initial, tensors, strict=True))
        tracked = torch.is_grad_enabled()
        if not tracked:  # evaluation, or a step whose graph is rebuilt later
            learning = self.model.adapting
            adapted = {
                name: t.detach().requires_grad_(name in learning) for name, t in adapted.items()
            }
        counters, order = self.model.counters, tracked and self.settings.second_order
        with fixed_at(counters, self.step), with_order(counters, order):
            with torch.enable_grad():
                losses, (_, seen) = self._forward(adapted, self.support)
                grads = self._gradients(losses, adapted, order)
            updated = self.model.lslr.update(adapted, grads, self.step)
        return *updated.values(), *seen

    def target(self, *tensors: Tensor, differentiated_once: bool = False) -> tuple[Tensor, ...]:
        """Returns the losses [T], the logits [T, Q, ...] and the statistics."""
        self._begin()
        updated = dict(zip(self.model.initial, tensors, strict=True))
        further = torch.is_grad_enabled() and not differentiated_once
        counters, order = self.model.counters, further and self.settings.second_order
        with fixed_at(counters, self.step), with_order(counters, order):
            losses, (logits, seen) = self._forward(updated, self.queried)
        return losses, logits.detach(), *seen

    def statistics_of(self, found: tuple[Tensor, ...]) -> BatchStatistics:
        """Returns the statistics of the last call, of T tasks each, with their places."""
        of_all = [t.unsqueeze(0) for t in found] if self.single else found
        return [*zip(self.places, of_all[::2], of_all[1::2], strict=True)]

    def _begin(self) -> None:
        if self.model.mode() != self.mode:  # rebuilding the step would compute something else
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )
        self.places = []

    def _gradients(
        self, losses: Tensor, adapted: Params, with_graph: bool
    ) -> dict[str, Tensor | None]:
        # No loss depends on another task's weights: the sum's gradient is each one's.
        names = self.model.adapting  # not those frozen since
        wanted = [adapted[name] for name in names]
        found = torch.autograd.grad(
            losses.sum(), wanted, create_graph=with_graph, allow_unused=True
        )
        return {**dict.fromkeys(adapted), **dict(zip(names, found, strict=True))}

    def _forward(
        self, adapted: Params, data: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        if self.single:
            return self._loss(adapted, *data)
        try:
            return vmap(self._loss, randomness="different")(adapted, *data)
        except RuntimeError as error:
            if "vmap" not in str(error) and "Batching rule" not in str(error):
                raise
            raise RuntimeError(
                f"{error}\nThe model or loss_fn does something that torch.func.vmap cannot run "
                "for several tasks at once; pass chunk_size=1 to run them one by one"
            ) from error

    def _loss(
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        statistics: BatchStatistics = []
        for counter in self.model.counters:
            counter.collected = statistics
        try:
            logits = self.model(adapted, x)
            loss = self.settings.loss_fn(logits, y)
        finally:
            for counter in self.model.counters:
                counter.collected = None
        _check_outputs(loss, logits)
        self.places += [place for place, _, _ in statistics]
        return loss, (logits, [value for _, *values in statistics for value in values])


def _check_outputs(loss: Any, logits: Any) -> None:
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
