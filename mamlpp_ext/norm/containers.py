"""What containers and objects hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

MOST = 1000  # larger containers hold data, no layers
_ENOUGH = 10_000


def parts_of(value: Any, *, callables: bool = False) -> Collection[Any] | None:
    """Returns what is in a container, or in an object's attributes; None of anything else.

    A dict's keys are among it. Modules are not taken apart, as whoever looks through a model has
    each, nor are classes and functions, with what these capture.

    Args:
        value: anything.
        callables: whether to take apart objects that can be called, too. What these hold may be
            their own business: a probe that counts its calls is no state of the model.
    """
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return None
    if callable(value) and not (callables and isinstance(type(value).__call__, FunctionType)):
        return None
    return parts_of(vars(value))


def all_in(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yields a value and all that it holds, however deep, each container and object once.

    Args:
        value: anything.
        seen: the ids of containers that were yielded before; those of this value are added.
    """
    seen, stack, count = set() if seen is None else seen, [value], 0
    while stack and count < _ENOUGH:
        count += 1
        value = stack.pop()
        parts = parts_of(value)
        if parts is not None and id(value) in seen:
            continue
        yield value
        if parts is not None:
            seen.add(id(value))
            stack += parts if len(parts) <= MOST else ()


def ids_in(container: Any) -> list[int]:
    """Returns the ids of what is in a container."""
    return [id(value) for value in parts_of(container) or ()]


def fill(container: Any, content: Iterable[Any]) -> None:
    """Gives a list, deque, set or dict other content, in place."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
