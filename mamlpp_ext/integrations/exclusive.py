"""One inner loop at a time on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

# Not a mark on the model: a copy of it, and higher's patched model, would carry that along.
_INSIDE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def exclusive(net: nn.Module) -> Iterator[None]:
    """Refuses a second inner loop on ``net`` that begins before this one has ended.

    Raises:
        RuntimeError: if it does.
    """
    if net in _INSIDE:
        raise RuntimeError(
            f"this {type(net).__name__} is inside an innerloop_ctx already, and two that are open "
            "at once would undo each other's work; leave one before entering the next (its losses "
            "may be differentiated later), or use a copy.deepcopy of the model"
        )
    _INSIDE.add(net)
    try:
        yield
    finally:
        _INSIDE.discard(net)
