"""What a forward left behind in the model, for when it is run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from mamlpp_ext.task_batch.state import Place, State


class Replay:
    """Runs a forward again with what it met the first time, and leaves no trace.

    Args:
        modules: of the model.
        known: where it changes the model, as far as is known; see :class:`State`.
    """

    def __init__(self, modules: Sequence[nn.Module], known: Sequence[tuple[int, str]]) -> None:
        self.modules, self.known = modules, known
        self.changed: list[Place] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Runs it inside the ``with`` block: the first time, or again."""
        if self.changed is None:
            before = State(self.modules)
            yield
            self.changed = before.changed(self.known)
            return
        now = [Place.of(place.own, place.layer, place.name) for place in self.changed]
        try:
            for place in self.changed:
                place.put_copy()
            yield
        finally:
            for place in now:
                place.put_back()
