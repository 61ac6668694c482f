"""A whole batch of tasks at once, with torch.func."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mamlpp_ext.lslr import LSLR
from mamlpp_ext.multi_step_loss import FinalStepLoss, MultiStepLoss
from mamlpp_ext.rematerialize import rematerialized
from mamlpp_ext.steps import Tape, at_step, checked_count, per_step_layers

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Aggregate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TaskBatchResult:
    """What :func:`task_batch_loss` returns.

    Attributes:
        loss: the meta-loss, mean over tasks, shape []; the one to call ``backward`` on.
        step_losses: the target loss after each inner step, [T, num_steps], detached.
        logits: the target outputs after the last inner step, [T, Q, ...], detached.
    """

    loss: Tensor
    step_losses: Tensor
    logits: Tensor


def task_batch_loss(
    model: nn.Module,
    lslr: LSLR,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    loss_fn: Loss,
    *,
    num_steps: int,
    aggregate: Aggregate | None = None,
    second_order: bool = True,
    rematerialize: bool = False,
    chunk_size: int | None = None,
) -> TaskBatchResult:
    """Adapts to a meta-batch of tasks at once and returns the meta-loss.

    Equal to the loop over tasks, inner steps, support forward, update and target forward, with
    ``torch.func.vmap`` in place of the loop over tasks. In training mode the running statistics of
    per-step layers are updated once it succeeds, as T tasks in turn would have left them. Random
    layers (dropout) draw anew for every task. Under ``torch.no_grad()`` it evaluates.

    Args:
        model: the model; its parameters are the initial weights and are not changed.
        lslr: the rates; they decide what is adapted.
        batch: support inputs [T, S, ...], support labels [T, S, ...], target inputs [T, Q, ...],
            target labels [T, Q, ...].
        loss_fn: ``(logits, labels) -> 0-dim loss`` of one task, e.g. ``F.cross_entropy``.
        num_steps: K, the number of inner steps.
        aggregate: from step losses [T, num_steps] to a loss for each task, [T]:
            :class:`MultiStepLoss`, or any function; None is the final step's loss.
        second_order: whether to differentiate through the inner gradients.
        rematerialize: keep only each step's weights and rebuild its graph in the backward: memory
            nearly flat in ``num_steps``, for more time.
        chunk_size: how many tasks at once; None for all.

    Returns:
        The meta-loss, the step losses and the last logits.

    Raises:
        TypeError: if a count is not a whole number, or ``loss_fn`` does not return a tensor.
        ValueError: if shapes do not agree, the loss is not 0-dim, a step is out of range, the
            rates are another model's, or the model has a plain BatchNorm, or a LayerNorm or
            InstanceNorm whose weight is adapted (torch differentiates these wrongly under vmap).

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> batch = (torch.randn(4, 5, 3), torch.randint(2, (4, 5)),
        ...          torch.randn(4, 7, 3), torch.randint(2, (4, 7)))
        >>> lslr = LSLR(net, num_steps=5)
        >>> result = task_batch_loss(net, lslr, batch, nn.functional.cross_entropy, num_steps=5)
        >>> result.loss.backward()
        >>> result.step_losses.shape, result.logits.shape
        (torch.Size([4, 5]), torch.Size([4, 7, 2]))
    """
    num_steps = checked_count("num_steps", num_steps)
    tasks = _check_batch(batch)
    size = tasks if chunk_size is None else checked_count("chunk_size", chunk_size)
    _check_layers(model, lslr.names)
    counted = _counted_steps(aggregate, num_steps)
    inner = _InnerLoop(model, lslr, loss_fn, second_order, rematerialize)
    parts = zip(*(torch.split(tensor, size) for tensor in batch), strict=True)
    losses, logits, tapes = zip(*(inner.run(part, counted) for part in parts), strict=True)
    step_losses = torch.cat(losses)
    loss = (step_losses[:, -1] if aggregate is None else aggregate(step_losses)).mean()
    _commit(tapes)
    return TaskBatchResult(loss, step_losses.detach(), torch.cat(logits))


class _InnerLoop:
    """The inner loop of a chunk of tasks, one vmapped step after the other."""

    def __init__(
        self, model: nn.Module, lslr: LSLR, loss_fn: Loss, second_order: bool, rematerialize: bool
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, lslr, loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.initial = lslr.parameters_of(model)
        outer = [p for name, p in model.named_parameters() if name not in self.initial]
        self.captured = [p for p in (*outer, *lslr.parameters()) if p.requires_grad]
        self.layers = per_step_layers(model).values()

    def run(self, data: tuple[Tensor, ...], counted: list[bool]) -> tuple[Tensor, Tensor, Tape]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and the tape."""
        adapted: Params = dict(self.initial)
        losses, tape = [], Tape()
        for step, counts in enumerate(counted):
            one_step = _Step(self, step, counts, data)
            if self.rematerialize and torch.is_grad_enabled():
                outputs = rematerialized(one_step, tuple(adapted.values()), self.captured)
            else:
                outputs = one_step(*adapted.values())
            adapted = dict(zip(adapted, outputs, strict=False))
            loss, logits, *statistics = outputs[len(adapted) :]
            losses.append(loss)
            tape += zip(one_step.places, statistics[::2], statistics[1::2], strict=True)
        return torch.stack(losses, dim=1), logits, tape


class _Step:
    """One inner step of a chunk of tasks, a pure function of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic among the outputs.
    """

    def __init__(
        self, inner: _InnerLoop, step: int, counts: bool, data: tuple[Tensor, ...]
    ) -> None:
        self.inner, self.step, self.counts, self.data = inner, step, counts, data
        self.mode = self._mode()
        self.places: list[tuple[nn.Module, int]] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors, the target losses [T], the logits and the statistics."""
        if self._mode() != self.mode:  # rebuilding the step would compute something else
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )
        self.places = []
        adapted = dict(zip(self.inner.initial, tensors, strict=True))
        shared = 0 if self.step else None  # all tasks start from the same initial weights
        in_dims = (shared, *[0] * len(self.data))
        with at_step(self.inner.model, self.step):
            return vmap(self._task, in_dims, randomness="different")(adapted, *self.data)

    def _task(self, adapted: Params, *data: Tensor) -> tuple[Tensor, ...]:
        x_support, y_support, x_target, y_target = data
        tracked = torch.is_grad_enabled()
        second = self.inner.second_order
        start = adapted if second else {name: p.detach() for name, p in adapted.items()}
        with torch.set_grad_enabled(tracked and second):  # first order: no graph of the gradients
            grads, (_, seen) = grad(self._loss, has_aux=True)(start, x_support, y_support)
        updated = self.inner.lslr.update(adapted, grads, self.step)
        with torch.set_grad_enabled(tracked and self.counts):
            loss, (logits, seen_later) = self._loss(updated, x_target, y_target)
        return *updated.values(), loss, logits.detach(), *seen, *seen_later

    def _loss(
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for layer in self.inner.layers:
            layer.inner_step.tape = tape
        try:
            logits = functional_call(self.inner.model, adapted, (x,))
            loss = self.inner.loss_fn(logits, y)
        finally:
            for layer in self.inner.layers:
                layer.inner_step.tape = None
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"loss_fn must return one 0-dim tensor for a task, got {got}; reduce it, e.g. with "
                "reduction='mean'"
            )
        self.places += [place for place, _, _ in tape]
        return loss, (logits, [value for _, *values in tape for value in values])

    def _mode(self) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        """What decides how the layers compute, besides their tensors."""
        frozen = tuple(layer.inner_step.frozen for layer in self.inner.layers)
        return tuple(module.training for module in self.inner.model.modules()), frozen


def _commit(tapes: tuple[Tape, ...]) -> None:
    """Takes the statistics of every task into the layers, in the order of tasks in turn."""
    for tape in tapes:
        by_place: dict[tuple[nn.Module, int], list[tuple[Tensor, Tensor]]] = {}
        for place, mean, variance in tape:
            by_place.setdefault(place, []).append((mean, variance))
        for (layer, row), seen in by_place.items():
            means, variances = (torch.stack(values, dim=1) for values in zip(*seen, strict=True))
            layer.absorb(row, means.flatten(0, 1), variances.flatten(0, 1))  # type: ignore[operator]


def _counted_steps(aggregate: Aggregate | None, num_steps: int) -> list[bool]:
    """Says for each step whether its target loss enters the meta-loss, so needs a graph."""
    if isinstance(aggregate, MultiStepLoss):
        return [weight > 0 for weight in aggregate.weights.tolist()]
    final_only = aggregate is None or isinstance(aggregate, FinalStepLoss)
    return [not final_only or step == num_steps - 1 for step in range(num_steps)]


def _check_batch(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
    names = ("x_support", "y_support", "x_target", "y_target")
    if len(batch) != len(names) or not all(isinstance(t, Tensor) and t.dim() > 1 for t in batch):
        got = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in batch]
        raise ValueError(
            f"batch must be {names} of shapes [T, S, ...], [T, S, ...], [T, Q, ...], [T, Q, ...], "
            f"got {got}; stack the tasks along a new dimension 0"
        )
    shapes = {name: tuple(t.shape[:2]) for name, t in zip(names, batch, strict=True)}
    x_support, y_support, x_target, y_target = shapes.values()
    if x_support != y_support or x_target != y_target or x_support[0] != x_target[0]:
        raise ValueError(
            "the parts of batch must agree in T, inputs and labels also in their number of "
            f"examples; got [T, examples] {shapes}"
        )
    if x_support[0] < 1:
        raise ValueError(f"batch must hold at least one task, got shapes {shapes}")
    return x_support[0]


def _check_layers(model: nn.Module, adapted: tuple[str, ...]) -> None:
    # torch 2.13: the second derivatives of torch's own norms are silently wrong under vmap when
    # their weight differs from task to task; a BatchNorm with running statistics raises besides.
    for name, layer in model.named_modules():
        where = f"layer '{name}' ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm):
            raise ValueError(
                f"{where} gives wrong meta-gradients under vmap; convert the model with "
                "convert_batchnorm(model, num_steps), or to keep plain BatchNorm's meaning with "
                "convert_batchnorm(model, 1, extra_steps='last')"
            )
        if isinstance(layer, (nn.LayerNorm, _InstanceNorm)) and f"{name}.weight" in adapted:
            raise ValueError(
                f"{where} gives wrong meta-gradients under vmap when its weight is adapted; leave "
                f"'{name}.weight' out with LSLR's adapt, or loop over the tasks with higher or "
                "torchopt"
            )
