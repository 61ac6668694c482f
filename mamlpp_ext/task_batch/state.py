"""What a forward leaves behind in a model: in buffers and plain attributes.

In every forward these are the attributes of layers that have code of their own: torch's and ours
leave nothing in theirs, and looking through all of them would be felt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.norm import MOST, all_in, fill, ids_in
from mamlpp_ext.task_batch.contents import content_of, copy_of, same, same_tensors
from mamlpp_ext.torch_private import changes_of, held, is_hooked, is_wrapped, plain_names

_MISSING: Any = object()
_FEW = 10_000  # values that may be compared in every forward
_CONTAINERS = (list, dict, set, deque)


class Place(NamedTuple):
    """A buffer or attribute as it was.

    Attributes:
        own: the dict that holds it.
        name: its name there.
        value: what was there, or nothing.
        copy: of a tensor or container, which may be written to; None of others.
        changes: how often the tensor had been written to.
        by_value: whether it is compared: writes through ``.data`` count no change.
    """

    own: dict[str, Any]
    name: str
    value: Any
    copy: Any = None
    changes: int = 0
    by_value: bool = False

    @property
    def now(self) -> Any:
        """What is there now, or nothing."""
        return self.own.get(self.name, _MISSING)

    def was_changed(self) -> bool:
        """Returns whether there is something else now."""
        return self.now is not self.value or self._was_written()

    def _was_written(self) -> bool:
        if self.copy is None:
            return False
        if not isinstance(self.value, Tensor):
            return ids_in(self.value) != ids_in(self.copy)
        if changes_of(self.value) != self.changes:
            return True
        return self.by_value and not same_tensors(self.value, self.copy)

    def put(self, value: Any) -> None:
        """Puts something there, or nothing."""
        _put(self.own, self.name, value)

    def put_back(self) -> None:
        """Puts there what was there, with the content that it had."""
        self.put(self.value)
        if not self._was_written():
            return
        if not isinstance(self.value, Tensor):
            fill(self.value, self.copy)
        elif self.value.shape == self.copy.shape:
            with torch.no_grad():
                self.value.copy_(self.copy)
        else:  # it was resized
            self.put(self.copy)


class State:
    """All that a forward may leave behind in a model, as it is now.

    Args:
        modules: of the model.
        every: whether to look at the attributes of all layers, and at all values.
    """

    def __init__(self, modules: Sequence[nn.Module], *, every: bool = False) -> None:
        self._holders: list[tuple[dict[str, Any], nn.Module | None]] = [
            *((own, None) for own in _buffers_of(modules)),
            *((vars(module), module) for module in modules if every or _has_code(module)),
        ]
        copies: dict[int, Any] = {}  # what stands in several places is one thing in the copy, too
        self._places = {
            (number, name): _place(own, name, copies, every) for number, own, name in self._names()
        }

    def _names(self) -> Iterator[tuple[int, dict[str, Any], str]]:
        for number, (own, module) in enumerate(self._holders):
            for name in list(own) if module is None else plain_names(vars(module)):
                yield number, own, name

    def changed(self) -> list[Place]:
        """Returns the places where something else is now.

        Not flags: what says that hooks are there, for instance, is true as long as they are.
        """
        found = [p for p in self._places.values() if p.was_changed()]
        for number, own, name in self._names():
            if (number, name) not in self._places:
                found.append(Place(own, name, _MISSING))
        return [place for place in found if not isinstance(place.now, bool)]

    def put_back(self) -> None:
        """Puts everything back as it was, but flags."""
        for place in self.changed():
            place.put_back()

    def put_back_buffers(self) -> None:
        """Puts the buffers back as they were."""
        buffers = {id(own) for own, module in self._holders if module is None}
        for place in self.changed():
            if id(place.own) in buffers:
                place.put_back()


def contents(model: nn.Module) -> dict[str, list[Any]]:
    """Returns what all that a forward may leave behind in a model holds, by its name.

    What is held in several places counts in the first.
    """
    seen: set[int] = set()
    found = {n: content_of(b, seen) for n, b in model.named_buffers(remove_duplicate=False)}
    for path, module in model.named_modules():
        for name in sorted(plain_names(vars(module))):
            found[f"{path}.{name}".lstrip(".")] = content_of(vars(module)[name], seen)
    return found


def changed_names(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    """Returns the names of what holds something else than before."""
    return [name for name in after if not same(before.get(name, []), after[name])]


def flags_of(modules: Sequence[nn.Module]) -> tuple[bool, ...]:
    """Returns what is switched on and off in layers that have code of their own."""
    own = (vars(module) for module in modules if _has_code(module))
    return tuple(v for each in own for v in each.values() if isinstance(v, bool))


@contextmanager
def nothing_wrapped_left(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back attributes in which a vmap's block leaves values of its inside.

    They can be used no more, and of several tasks none is the last.
    """
    before = []
    for own in [vars(module) for module in modules if _has_code(module)]:
        attributes = {name: own[name] for name in plain_names(own)}
        copies = [(v, copy) for v in attributes.values() if (copy := _copied(v)) is not None]
        before.append((own, attributes, copies))
    try:
        yield
    finally:
        for own, attributes, copies in before:
            for container, copy in copies:
                if _holds_wrapped(container):
                    fill(container, copy)
            for name in plain_names(own):
                then = attributes.get(name, _MISSING)
                if own[name] is not then and _holds_wrapped(own[name]):
                    _put(own, name, then)


def _put(own: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        own.pop(name, None)
    else:
        own[name] = value


def _buffers_of(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    every = [held(module, "buffers") for module in modules]
    return [own for own in every if isinstance(own, dict)]  # those of scripted layers are torch's


def _has_code(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith(("torch.nn.modules.", "mamlpp_ext."))
    return not ours or "forward" in vars(module) or is_hooked(module)


def _place(own: dict[str, Any], name: str, copies: dict[int, Any], every: bool) -> Place:
    value = own[name]
    if id(value) not in copies:
        copies[id(value)] = copied(value)
    copy = copies[id(value)]
    if not isinstance(copy, Tensor):
        return Place(own, name, value, copy)
    # On a GPU a look has to wait for it.
    by_value = every or (value.device.type == "cpu" and value.numel() <= _FEW)
    return Place(own, name, value, copy, changes_of(value), by_value)


def copied(value: Any) -> Any:
    """Returns a copy of a tensor or small container, and None of anything else."""
    return copy_of(value) if isinstance(value, Tensor) else _copied(value)


def _copied(value: Any) -> Any:
    is_small = isinstance(value, _CONTAINERS) and len(value) <= MOST
    return value.copy() if is_small else None


def _holds_wrapped(value: Any) -> bool:
    return any(isinstance(thing, Tensor) and is_wrapped(thing) for thing in all_in(value))
