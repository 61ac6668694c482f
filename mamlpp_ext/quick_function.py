"""``torch.autograd.Function`` at less cost for each call, and what several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What torch.autograd.Function itself asks; not there, every call takes the longer way.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_innermost: Any
try:  # torch's own parts of a vmap rule's call, none of them public
    from torch._C._functorch import _add_batch_dim as _wrap
    from torch._C._functorch import _unwrap_batched as _unwrap
    from torch._functorch.autograd_function import VmapInfo
    from torch._functorch.pyfunctorch import VmapInterpreter
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as _innermost
except ImportError:
    _innermost = None


class QuickFunction(torch.autograd.Function):
    """A Function whose ``apply`` skips what torch does there for the sake of torch.func alone.

    Binding the arguments to the forward's signature takes a third of a small layer's time.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls it; within a torch.func transform other than vmap in torch's own way."""
        if not transforms_active():
            return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
        interpreter = None if _innermost is None else _innermost()
        if interpreter is not None and isinstance(interpreter, VmapInterpreter):
            return _by_its_rule(cls, interpreter, args)
        return super().apply(*args)  # type: ignore[no-untyped-call]


def _by_its_rule(function: Any, interpreter: Any, args: tuple[Any, ...]) -> Any:
    """Calls the function's rule for vmap as torch does, for arguments that are no nests of tensors.

    torch looks for tensors in whatever the arguments may hold: 170 us a call, as long as a small
    layer's arithmetic (measured in ``task_batch_loss``).
    """
    level, size = interpreter.level(), interpreter.batch_size()
    pairs = [_unwrap(arg, level) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    values, dims = zip(*pairs, strict=True)
    # Modes see the call as a whole, if at all, as in torch's own way.
    with interpreter.lower(), torch._C.DisableTorchFunction():
        if all(dim is None for dim in dims):
            return function.apply(*values)
        outputs, places = function.vmap(VmapInfo(size, interpreter.randomness()), dims, *values)
    if isinstance(outputs, Tensor):
        return _wrap(outputs, places, level)
    each = zip(outputs, places, strict=True)
    return tuple(None if t is None else _wrap(t, place, level) for t, place in each)


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


def is_for_kernels(x: Any, *devices: str) -> bool:
    """Returns whether ``x`` is floating-point, on one of ``devices``, and of no other class."""
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return plain and x.device.type in devices and x.is_floating_point()


def forward_mode_active() -> bool:
    """Returns whether tensors may carry tangents, by ``jvp`` or dual numbers."""
    return forward_ad._current_level >= 0


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves ``tensors`` for the backward and, where one may be called, for the ``jvp``."""
    ctx.save_for_backward(*tensors)
    if forward_mode_active():
        ctx.save_for_forward(*tensors)


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
