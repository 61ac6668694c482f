"""What things hold, for comparing it with what they hold later."""

from __future__ import annotations

import numbers
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.torch_private import is_wrapped

MOST = 1000  # larger containers hold data
_DEEPEST = 8  # of a dict's items each takes two
_CONTAINERS = (list, tuple, set, frozenset, deque)
_PLAIN = (numbers.Number, str, bytes, type(None), torch.dtype, torch.device)


def content_of(value: Any, depth: int = _DEEPEST) -> Any:
    """Returns what a value holds, for :func:`same`; of what cannot be told, its type.

    Args:
        value: a tensor, number, string, array, container, or an object with attributes.
        depth: how far to go into it.
    """
    if isinstance(value, Tensor):
        return _copied(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if hasattr(value, "tobytes"):  # an array of numpy's
        return [str(value.dtype), value.shape, value.tobytes()]
    if isinstance(value, dict):
        value = [*value.items()]
    elif not isinstance(value, _CONTAINERS):
        others = isinstance(value, nn.Module) or callable(value) or not hasattr(value, "__dict__")
        if others:
            return type(value)
        value = [*vars(value).items()]
    if not depth or len(value) > MOST:
        return type(value)
    return [content_of(each, depth - 1) for each in value]


def _copied(tensor: Tensor) -> Any:
    if is_wrapped(tensor):  # of a transform that may be over
        return Tensor
    try:
        return tensor.detach().clone()
    except (RuntimeError, NotImplementedError):  # quantised, nested, ...
        return Tensor


def same(a: Any, b: Any) -> bool:
    """Returns whether two contents are the same, as far as can be told."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        try:
            return _same_tensors(a, b)
        except (RuntimeError, NotImplementedError):  # sparse, of another device, ...
            return True
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (bool(a == b) or (a != a and b != b))


def _same_tensors(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.is_cuda and a.is_floating_point():  # sums are of another order each time
        return torch.allclose(a, b, rtol=0, atol=1e-4 * float(a.abs().max()), equal_nan=True)
    return bool(((a == b) | ((a != a) & (b != b))).all())
