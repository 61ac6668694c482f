"""Losses that are added up one after the other, each with its gradient taken at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def added_up(losses: Iterable[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Returns the sum of ``losses``; never keeps the graph of more than one.

    Args:
        losses: 0-dim, computed while this iterates.
        tensors: what gradients must reach; further ones get none, and the gradients no graph.
    """
    total: Any = 0.0
    grads: list[Tensor | None] = [None] * len(tensors)
    for loss in losses:
        if loss.requires_grad:
            found = torch.autograd.grad(loss, tensors, allow_unused=True)
            grads = [_sum(pair) for pair in zip(grads, found, strict=True)]
        total = total + loss.detach()
    return with_gradients(total, grads, tensors)


def with_gradients(
    loss: Tensor, grads: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> Tensor:
    """Returns ``loss``, without a graph, as one whose gradients to ``tensors`` are ``grads``."""
    apply: Any = _WithGradients.apply
    return apply(loss, grads, *tensors)  # type: ignore[no-any-return]


def _sum(pair: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    there = [grad for grad in pair if grad is not None]
    return torch.add(*there) if len(there) == 2 else there[0] if there else None


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, grads: Sequence[Tensor | None], *tensors: Tensor
    ) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, None, *(None if grad is None else cotangent * grad for grad in ctx.grads)
