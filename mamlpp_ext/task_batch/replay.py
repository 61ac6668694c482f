"""Buffers that a forward changes, for when it is run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mamlpp_ext.torch_private import changes_of, held


class Replay:
    """Runs a forward again with the buffers that it met the first time, and leaves no trace.

    Args:
        modules: of the model.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.changed: list[tuple[dict[str, Any], str, Any]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Runs it inside the ``with`` block: the first time, or again."""
        if self.changed is None:
            before = [(own, name, b, changes_of(b), b.clone()) for own, name, b in self._buffers()]
            yield
            self.changed = [
                (own, name, value)
                for own, name, buffer, version, value in before
                if own.get(name) is not buffer or changes_of(buffer) != version
            ]
            return
        now = [(own, name, own[name]) for own, name, _ in self.changed]
        try:
            for own, name, value in self.changed:
                own[name] = value.clone()
            yield
        finally:
            for own, name, buffer in now:
                own[name] = buffer

    def _buffers(self) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
        return [
            (buffers, name, buffer)
            for buffers in [held(module, "buffers") for module in self.modules]
            for name, buffer in buffers.items()
            if buffer is not None
        ]
