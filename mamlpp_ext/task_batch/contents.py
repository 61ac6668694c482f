"""What things hold, for comparing it with what they hold later."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.norm import all_in
from mamlpp_ext.torch_private import is_wrapped

_PLAIN = (numbers.Number, str, bytes, type(None), torch.dtype, torch.device)


def content_of(value: Any, seen: set[int]) -> list[Any]:
    """Returns what a value and all in it come to, for :func:`same`.

    Args:
        value: anything; of what cannot be told, the type counts.
        seen: the ids of containers and objects whose content is known, to which are added its own.
    """
    return [_copied(thing) for thing in all_in(value, seen)]


def _copied(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        copy = copy_of(thing)
        return Tensor if copy is None else copy
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if hasattr(thing, "tobytes"):  # an array of numpy's
        return str(thing.dtype), thing.shape, thing.tobytes()
    return thing if isinstance(thing, _PLAIN) else type(thing)


def copy_of(tensor: Tensor) -> Tensor | None:
    """Returns a copy without a graph, or None if it cannot be copied."""
    if is_wrapped(tensor):  # of a transform that may be over
        return None
    try:
        return tensor.detach().clone()
    except (RuntimeError, NotImplementedError):  # quantised, nested, ...
        return None


def same(some: list[Any], others: list[Any]) -> bool:
    """Returns whether two contents are the same, as far as can be told."""
    return len(some) == len(others) and all(map(_are_same, some, others))


def _are_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_tensors(a, b)
    return type(a) is type(b) and (bool(a == b) or (a != a and b != b))


def same_tensors(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same values, as far as can be told."""
    try:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if a.is_cuda and a.is_floating_point():  # sums are of another order each time
            return torch.allclose(a, b, rtol=0, atol=1e-4 * float(a.abs().max()), equal_nan=True)
        return bool(((a == b) | ((a != a) & (b != b))).all())
    except (RuntimeError, NotImplementedError):  # sparse, of another device, ...
        return True
