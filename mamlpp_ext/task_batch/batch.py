"""The tasks of a meta-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Support inputs and labels, target inputs and labels, each [T, examples, ...].
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def in_chunks(batch: Batch, size: int) -> Iterator[Batch]:
    """Yields the tasks, ``size`` at once."""
    return zip(*(torch.split(t, size) for t in batch), strict=True)


def check_batch(batch: Batch) -> int:
    """Returns T, the number of tasks, if the parts agree."""
    names = ("x_support", "y_support", "x_target", "y_target")
    if len(batch) != len(names) or not all(isinstance(t, Tensor) and t.dim() > 1 for t in batch):
        got: Any = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in batch]
        got = got if isinstance(batch, (tuple, list)) else type(batch).__name__
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
    if 0 in x_support or 0 in x_target:
        raise ValueError(
            "batch must hold at least one task with at least one example in each part, got "
            f"[T, examples] {shapes}"
        )
    return x_support[0]
