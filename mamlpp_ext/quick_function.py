"""``torch.autograd.Function`` at less cost for each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What torch.autograd.Function itself asks; not there, every call takes the longer way.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class QuickFunction(torch.autograd.Function):
    """A Function whose ``apply`` skips what torch does there for the sake of torch.func alone.

    Binding the arguments to the forward's signature takes a third of a small layer's time.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls it; within a torch.func transform in torch's own way."""
        if transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def folded(tensor: Tensor, dim: int | None, size: int, channel: int) -> Tensor:
    """Turns a vmapped dimension, or none, into ``size`` times as many channels.

    For a Function whose channels (or groups of them) do not see each other.
    """
    if dim is None:
        tensor = tensor.unsqueeze(channel)
        tensor = tensor.expand(*tensor.shape[:channel], size, *tensor.shape[channel + 1 :])
    else:
        tensor = tensor.movedim(dim, channel)
    return tensor.flatten(channel, channel + 1)


def forward_mode_active() -> bool:
    """Returns whether tensors may carry tangents, by ``jvp`` or dual numbers."""
    return forward_ad._current_level >= 0


@contextmanager
def primals(saved: Sequence[Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """Yields what a ``jvp`` has saved, without tangents, for it to compute with.

    torch turns forward mode off within ``jvp``, and with it that of every enclosing transform: its
    tangents would be lost without a word. So it is on again here, and only the tangents of this
    very call are put aside.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        unpack: Any = forward_ad.unpack_dual
        yield tuple(None if t is None else unpack(t).primal for t in saved)
