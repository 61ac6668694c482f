"""``torch.autograd.Function`` at less cost for each call, and what several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mamlpp_ext import torch_private


class QuickFunction(torch.autograd.Function):
    """A Function whose ``apply`` skips what torch does there for the sake of torch.func alone.

    Binding the arguments to the forward's signature takes a third of a small layer's time.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls it; within a torch.func transform other than vmap in torch's own way."""
        if not torch_private.transforms_active():
            apply = torch_private.quick_apply(cls) or super().apply
            return apply(*args)
        interpreter = torch_private.innermost_vmap()
        if interpreter is not None:
            return _by_its_rule(cls, interpreter, args)
        return super().apply(*args)  # type: ignore[no-untyped-call]


def _by_its_rule(function: Any, interpreter: Any, args: tuple[Any, ...]) -> Any:
    """Calls the function's rule for vmap as torch does, for arguments that are no nests of tensors.

    torch looks for tensors in whatever the arguments may hold: 170 us a call, as long as a small
    layer's arithmetic (measured in ``task_batch_loss``).
    """
    level, private = interpreter.level(), torch_private
    pairs = [
        private.unwrapped(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args
    ]
    values, dims = zip(*pairs, strict=True)
    # Modes see the call as a whole, if at all, as in torch's own way.
    with interpreter.lower(), private.modes_hidden():
        if all(dim is None for dim in dims):
            return function.apply(*values)
        outputs, places = function.vmap(private.vmap_info(interpreter), dims, *values)
    if isinstance(outputs, Tensor):
        return private.wrapped(outputs, places, level)
    each = zip(outputs, places, strict=True)
    return tuple(None if t is None else private.wrapped(t, place, level) for t, place in each)


def folded(tensor: Tensor | None, dim: int | None, size: int, channel: int) -> Any:
    """Turns a vmapped dimension, or none, into ``size`` times as many channels; None stays None.

    For a Function whose channels (or groups of them) do not see each other.
    """
    if tensor is None:
        return None
    if dim is None:
        repeats = [1] * tensor.dim()
        repeats[channel] = size
        return tensor.repeat(repeats)
    if dim != channel:
        tensor = tensor.movedim(dim, channel)
    flat = tensor.flatten(channel, channel + 1)
    # With one channel it is a view, and torch's CPU kernels read weights and statistics as if they
    # were contiguous (2.13: wrong gradients, no error).
    return flat if flat.dim() > 1 else flat.contiguous()


def all_folded(
    tensors: Sequence[Tensor | None], in_dims: Sequence[Any], size: int, channels: Sequence[int]
) -> list[Any]:
    """Folds a vmap rule's first arguments, whose channels are in the dimensions ``channels``."""
    triples = zip(tensors, in_dims[: len(tensors)], channels, strict=True)
    return [folded(tensor, dim, size, channel) for tensor, dim, channel in triples]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves ``tensors`` for the backward and, where one may be called, for the ``jvp``."""
    ctx.save_for_backward(*tensors)
    if torch_private.forward_mode_active():
        ctx.save_for_forward(*tensors)


@contextmanager
def primals(saved: Sequence[Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """Yields what a ``jvp`` has saved, without tangents, for it to compute with.

    torch turns forward mode off within ``jvp``, and with it that of every enclosing transform: its
    tangents would be lost without a word. So it is on again here, and only the tangents of this
    very call are put aside.
    """
    with torch_private.forward_mode_enabled():
        unpack: Any = forward_ad.unpack_dual
        yield tuple(None if t is None else unpack(t).primal for t in saved)
