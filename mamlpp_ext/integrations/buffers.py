"""The buffers of a model: put back where an inner loop fails, written back from higher's copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
        self._modules: list[tuple[dict[str, Any], dict[str, Any], dict[str, _Seen]]] = []
        copies: dict[int, Tensor] = {}  # a buffer in several places is one in the copy, too
        for module, twin in pairs:
            own, theirs = held(module, "buffers"), held(twin, "buffers")
            for key, buffer in own.items():
                if buffer is not None:
                    theirs[key] = copies.setdefault(id(buffer), theirs[key])
            before = {key: _Seen.of(copy, own.get(key)) for key, copy in theirs.items()}
            self._modules.append((own, theirs, before))

    def write_back(self) -> None:
        """Does to the model's buffers what was done to the copies.

        Replaced buffers are replaced, without their graph, and those that were written to are
        written to. Others are skipped: a write could invalidate a graph that saved them.
        """
        for own, theirs, before in self._modules:
            for key in own.keys() - theirs.keys():
                del own[key]
            for key, now in theirs.items():
                seen = before.get(key, _Seen())
                if now is not seen.copy:
                    own[key] = now.detach() if now is not None and now.requires_grad else now
                elif now is not None and seen.was_written(own.get(key)):
                    own[key] = _written(own.get(key), now)


class _Seen(NamedTuple):
    """A copy and its buffer as they were, and how often each had been written to."""

    copy: Tensor | None = None
    changes: int = 0
    buffer: Tensor | None = None
    changes_of_buffer: int = 0

    @classmethod
    def of(cls, copy: Tensor | None, buffer: Tensor | None) -> _Seen:
        """Returns both as they are now."""
        counts = [0 if t is None else changes_of(t) for t in (copy, buffer)]
        return cls(copy, counts[0], buffer, counts[1])

    def was_written(self, buffer: Tensor | None) -> bool:
        """Returns whether the copy has been written to since, given the buffer as it is now."""
        if self.copy is None:
            return False
        replaced = buffer is not self.buffer
        if buffer is None or replaced or changes_of(buffer) != self.changes_of_buffer:
            # The model itself has run, too: its buffer no longer has the copy's old value.
            return changes_of(self.copy) != self.changes
        return _was_written(self.copy, buffer, self.changes)


def _was_written(tensor: Tensor, other: Tensor, changes: int) -> bool:
    """Returns whether a tensor was written to since it had the value of ``other``.

    Args:
        tensor: the tensor.
        other: its value then.
        changes: how often it had been written to then.
    """
    if changes_of(tensor) != changes or tensor.layout != torch.strided:
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
