"""One inner step of a chunk of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import check_second_derivatives
from mamlpp_ext.steps import BatchStatistics
from mamlpp_ext.task_batch.adapted_model import AdaptedModel, Params
from mamlpp_ext.task_batch.batch import Examples, Tasks
from mamlpp_ext.task_batch.settings import Loss, Settings
from mamlpp_ext.task_batch.trees import taken_apart

# Runs a function of (adapted, *tensors) of a model for all tasks at once, or for one.
Way = Callable[..., Any]


class TaskStep:
    """One inner step of a chunk of tasks: pure functions of the adapted tensors.

    Args:
        model: what is adapted.
        settings: how.
        step: the inner step, 0-based.
        tasks: of one task without the dimension T, here and below.
        way: how a forward runs for all of them.

    Attributes:
        places: the layer and row of each batch statistic that the last call returned.
        rebuild: makes the last call's output again of its tensors.
    """

    def __init__(
        self,
        model: AdaptedModel,
        settings: Settings,
        step: int,
        tasks: Tasks,
        way: Way,
    ) -> None:
        self.model, self.settings, self.step = model, settings, step
        self.tasks, self.way = tasks, way
        self.mode = model.mode()
        self.places: list[tuple[nn.Module, int]] = []
        self.rebuild: Callable[[Sequence[Any]], Any] = tuple

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
        order = tracked and self.settings.second_order
        with self.model.at(self.step, order):
            with torch.enable_grad():
                losses, _, seen = self.support_losses(adapted)
                first = self.step == 0
                grads = self.model.gradients(losses, adapted, with_graph=order, first=first)
                if order and self.model.confirm is not None:
                    check_second_derivatives(grads.values())
                    self.model.confirm()
            updated = self.model.lslr.update(adapted, grads, self.step)
        return *updated.values(), *seen

    def target(self, *tensors: Tensor, differentiated_once: bool = False) -> tuple[Tensor, ...]:
        """Returns the losses [T], the statistics, and the tensors of the outputs [T, Q, ...]."""
        self._begin()
        updated = dict(zip(self.model.initial, tensors, strict=True))
        further = torch.is_grad_enabled() and not differentiated_once
        with self.model.at(self.step, further and self.settings.second_order):
            losses, outputs, seen = self._losses(updated, self.tasks.target, self.settings.loss_fn)
        return losses, *seen, *(output.detach() for output in outputs)

    def support_losses(self, adapted: Params) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the support losses [T], the tensors of the outputs, and the statistics."""
        loss_fn = self.settings.inner_loss_fn or self.settings.loss_fn
        return self._losses(adapted, self.tasks.support, loss_fn)

    def _begin(self) -> None:
        if self.model.mode() != self.mode:  # rebuilding the step would compute something else
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )
        self.places = []

    def _losses(
        self, adapted: Params, examples: Examples, loss_fn: Loss
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Returns the loss, the tensors of the output, and the statistics of each task."""

        def one_task(adapted: Params, *tensors: Tensor) -> tuple[Tensor, list[Tensor], list[Any]]:
            x, y = examples.made_of(tensors)
            statistics: BatchStatistics = []
            with self.model.collecting(statistics):
                output = self.model(adapted, x)
                loss = loss_fn(output, y)
            _check_loss(loss)
            tree = taken_apart(output, outputs=True)
            self.rebuild = tree.rebuild
            self.places += [place for place, _, _ in statistics]
            return loss, tree.tensors, [value for _, *values in statistics for value in values]

        return self.way(self.model, one_task, adapted, *examples.tensors)  # type: ignore[no-any-return]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise (ValueError if isinstance(loss, Tensor) else TypeError)(
            f"loss_fn must return one 0-dim tensor for a task, got {got}; reduce it, e.g. with "
            "reduction='mean'"
        )
