"""The buffers of a model: put back where an inner loop fails, written back from higher's copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.torch_private import changes_of, held


@contextmanager
def buffers_kept_on_error(net: nn.Module) -> Iterator[None]:
    """Puts every buffer of ``net`` back as it was if an exception ends the block."""
    every = [held(module, "buffers") for module in net.modules()]
    every = [own for own in every if isinstance(own, dict)]  # scripted ones will be refused
    kept = [(own, own.copy()) for own in every]
    before = {
        id(b): (b.clone(), changes_of(b)) for own in every for b in own.values() if b is not None
    }
    try:
        yield
    except BaseException:
        for own, buffers in kept:
            # A forward may have registered others, or put some in the place of these.
            for name in own.keys() - buffers.keys():
                del own[name]
            for name in [name for name in buffers if own.get(name) is not buffers[name]]:
                own[name] = buffers[name]
            for name, buffer in buffers.items():
                if buffer is not None and _was_written(buffer, *before[id(buffer)]):
                    own[name] = _written(buffer, before[id(buffer)][0])
        raise


class BufferCopies:
    """The buffers of a model and the copies that its patched twin works on.

    Args:
        pairs: each module of the model, and its twin.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self._places: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        copies: dict[int, Tensor] = {}  # a buffer in several places is one in the copy, too
        for module, twin in pairs:
            own, theirs = held(module, "buffers"), held(twin, "buffers")
            for key, buffer in own.items():
                if buffer is not None:
                    theirs[key] = copies.setdefault(id(buffer), theirs[key])
            before = {key: (t, None if t is None else changes_of(t)) for key, t in theirs.items()}
            self._places.append((own, theirs, before))

    def write_back(self) -> None:
        """Does to the model's buffers what was done to the copies: those alone that changed.

        What was assigned is assigned, without its graph, and what was written to is written to: a
        buffer that nobody changed may be part of a graph already.
        """
        for own, theirs, before in self._places:
            for key in own.keys() - theirs.keys():
                del own[key]
            for key, now in theirs.items():
                copy, changes = before.get(key, (None, None))
                if now is not copy:
                    own[key] = now.detach() if now is not None and now.requires_grad else now
                elif now is not None and _was_written(now, own.get(key), changes):
                    own[key] = _written(own.get(key), now)


def _was_written(tensor: Tensor, other: Tensor | None, changes: int | None) -> bool:
    """Returns whether a tensor that was as ``other`` is, and as often changed, no longer is."""
    if changes_of(tensor) != changes or other is None or tensor.layout != torch.strided:
        return True
    if torch.equal(tensor, other):  # else it was written to through .data, which counts no change
        return False
    may_be_nan = tensor.is_floating_point() and tensor.shape == other.shape
    return not (may_be_nan and torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True))


@torch.no_grad()
def _written(buffer: Tensor | None, value: Tensor) -> Tensor:
    """Returns the buffer with this value, or the value where it cannot take it."""
    if (
        buffer is None
        or (buffer.shape, buffer.dtype, buffer.device) != (value.shape, value.dtype, value.device)
        or any(n > 1 and not stride for n, stride in zip(value.shape, buffer.stride(), strict=True))
    ):
        return value  # it grew, or is expanded
    return buffer.copy_(value)
