"""Losses whose gradients are taken at once, so that no graph of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamlpp_ext.task_batch.rematerialize import detached


def added_up(losses: Iterable[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Returns the sum of ``losses``; never keeps the graph of more than one.

    Args:
        losses: 0-dim, computed while this iterates.
        tensors: what gradients must reach; further ones get none, and the gradients no graph.
    """
    tensors = distinct(tensors)  # or a gradient would arrive as often as its tensor stands there
    total: Any = 0.0
    grads: list[Tensor | None] = [None] * len(tensors)
    for loss in losses:
        if loss.requires_grad:
            found = torch.autograd.grad(loss, tensors, allow_unused=True)
            grads = [_sum(pair) for pair in zip(grads, found, strict=True)]
        total = total + loss.detach()
        del loss  # and with it what its graph holds, before the next is computed
    return with_gradients(total, grads, tensors)


def differentiated(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    captured: Sequence[Tensor],
    keep: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Returns ``run(*inputs)`` without its graph: losses, that have gradients, and further tensors.

    Args:
        run: a function of tensors.
        inputs: what it is called with.
        captured: further tensors that it uses and that gradients must reach; others get none.
        keep: returns a tensor's values in memory that may be held for long; None: as they are.

    Returns:
        What it returns. The same gradient has to arrive at all of the losses.
    """
    apply: Any = _Differentiated.apply
    return apply(run, len(inputs), keep, *inputs, *captured)  # type: ignore[no-any-return]


def with_gradients(
    loss: Tensor, grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> Tensor:
    """Returns ``loss``, without a graph, as one whose gradients to ``tensors`` are ``grads``."""
    apply: Any = _WithGradients.apply
    return apply(loss, grads, *tensors)  # type: ignore[no-any-return]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _sum(pair: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    there = [grad for grad in pair if grad is not None]
    return torch.add(*there) if len(there) == 2 else there[0] if there else None


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, grads: Sequence[Tensor | None], *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*grads)  # so that they go with the backward
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        grads = (None if grad is None else cotangent * grad for grad in ctx.saved_tensors)
        return None, None, *grads


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, count: int, keep: Any, *tensors: Tensor) -> Any:
        with torch.enable_grad():
            inputs = detached(tensors[:count])
            losses, *others = run(*inputs)
            wanted = [t for t in (*inputs, *tensors[count:]) if t.requires_grad]
            grads = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        found = iter(grads if keep is None else [None if g is None else keep(g) for g in grads])
        ctx.save_for_backward(*(next(found) if t.requires_grad else None for t in tensors))
        ctx.mark_non_differentiable(*others)
        return losses.detach(), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> Any:
        share = cotangent.flatten()[0]
        grads = (None if grad is None else share * grad for grad in ctx.saved_tensors)
        return None, None, None, *grads
