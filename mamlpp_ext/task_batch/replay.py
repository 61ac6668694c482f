"""Has a step that is run again meet what it met the first time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mamlpp_ext.task_batch.state import Place, State, copied


def replayed(run: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., Any]:
    """Returns the function, whose later runs meet what the first met, and leave no trace.

    Args:
        run: runs forwards of a model.
        modules: of the model, which is left as the first run leaves it.
    """
    changed: list[Place] | None = None

    def run_or_again(*args: Any, **kwargs: Any) -> Any:
        nonlocal changed
        if changed is None:
            before = State(modules)
            found = run(*args, **kwargs)
            changed = before.changed()
            return found
        now = [(place, place.now) for place in changed]
        copies: dict[int, Any] = {}
        try:
            for place in changed:
                if place.copy is not None and id(place.copy) not in copies:
                    copies[id(place.copy)] = copied(place.copy)
                place.put(place.value if place.copy is None else copies[id(place.copy)])
            return run(*args, **kwargs)
        finally:
            for place, value in now:
                place.put(value)

    return run_or_again
