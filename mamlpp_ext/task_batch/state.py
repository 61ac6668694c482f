"""What a forward may leave behind in a model: buffers and plain attributes."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.torch_private import changes_of, held, is_wrapped, plain_names

_MISSING: Any = object()
_MOST = 1000  # larger containers hold data
_SAME = 1e-5  # what rounding leaves of a value that was computed twice
_COMPARABLE = (numbers.Number, str, bytes, torch.Size, torch.dtype, torch.device, set, frozenset)


class Place(NamedTuple):
    """A buffer or plain attribute as it was.

    Attributes:
        own: the dict that holds it.
        layer: the number of its module.
        name: its name there.
        value: what was there, or nothing.
        copy: of a tensor or a container, since those may be written to.
        changes: how often the tensor had been written to.
    """

    own: dict[str, Any]
    layer: int
    name: str
    value: Any
    copy: Any = None
    changes: int = 0

    @classmethod
    def of(cls, own: dict[str, Any], layer: int, name: str) -> Place:
        """Returns it as it is now."""
        value = own.get(name, _MISSING)
        return cls(own, layer, name, value, _copy_of(value), _changes_of(value))

    @property
    def then(self) -> Any:
        """What was there, with the content that it had."""
        return self.value if self.copy is None else self.copy

    def was_changed(self, *, by_value: bool = False) -> bool:
        """Returns whether there is something else now.

        Args:
            by_value: whether tensors are compared, too: writes through ``.data`` count no change.
        """
        return self.own.get(self.name, _MISSING) is not self.value or self._was_written(by_value)

    def _was_written(self, by_value: bool) -> bool:
        if isinstance(self.value, Tensor):
            written = changes_of(self.value) != self.changes
            return written or (by_value and not _are_same(self.value, self.copy))
        return self.copy is not None and not _have_same(self.value, self.copy)

    def put_back(self, *, by_value: bool = False) -> None:
        """Puts there what was there, value and tensor."""
        if self.value is _MISSING:
            self.own.pop(self.name, None)
            return
        self.own[self.name] = self.value
        if not self._was_written(by_value):
            return
        if not isinstance(self.value, Tensor):
            self.value.clear()
            (self.value.extend if isinstance(self.value, list) else self.value.update)(self.copy)
        elif self.value.shape == self.copy.shape:
            with torch.no_grad():
                self.value.copy_(self.copy)
        else:  # it was resized
            self.own[self.name] = self.copy

    def put_copy(self) -> None:
        """Puts there something like what was there, which may be written to."""
        if self.value is _MISSING:
            self.own.pop(self.name, None)
        else:
            self.own[self.name] = self.value if self.copy is None else _copy_of(self.copy)


class State:
    """All that a forward may leave behind in a model, as it is now.

    Args:
        modules: of the model.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self._places = self._now()

    def _now(self) -> dict[tuple[int, str], Place]:
        return {
            (layer, name): Place.of(own, layer, name)
            for layer, module in enumerate(self.modules)
            for own, names in _held_by(module)
            for name in names
        }

    def changed(
        self, known: Iterable[tuple[int, str]] = (), *, by_value: bool = False
    ) -> list[Place]:
        """Returns the places where something else is now, or may be.

        Args:
            known: some that are said to change.
            by_value: see :meth:`Place.was_changed`.
        """
        there = self._places
        found = {k: p for k, p in there.items() if p.was_changed(by_value=by_value)}
        found |= {key: there[key] for key in known if key in there}
        for layer, module in enumerate(self.modules):
            for own, names in _held_by(module):
                new = [name for name in names if (layer, name) not in there]
                found |= {(layer, name): Place(own, layer, name, _MISSING) for name in new}
        return list(found.values())

    def changed_places(self) -> list[tuple[int, str]]:
        """Returns where something else is now: the number of a module, and a name."""
        return [(place.layer, place.name) for place in self.changed(by_value=True)]

    def is_plain(self, layer: int, name: str) -> bool:
        """Returns whether a place is a plain attribute, not a buffer."""
        return name in vars(self.modules[layer])

    def put_back(self) -> None:
        """Puts everything back as it was, values and tensors."""
        for place in self.changed(by_value=True):
            place.put_back(by_value=True)

    def differences(self, other: State) -> list[tuple[int, str]]:
        """Returns where two states differ by value: the number of a module, and a name."""
        ours, theirs = ({k: p.then for k, p in s._places.items()} for s in (self, other))
        every = {**ours, **theirs}
        return [k for k in every if not _are_same(ours.get(k), theirs.get(k))]


def paths_of(model: nn.Module, places: Iterable[tuple[int, str]]) -> list[str]:
    """Returns what places of a model are called in it, as parameters are."""
    layers = [path for path, _ in model.named_modules()]
    return [f"{layers[layer]}.{name}".lstrip(".") for layer, name in places]


class PutBack:
    """Puts back, after a vmap, attributes in which values of its inside were left.

    They can be used no more, and of several tasks none is the last.

    Args:
        modules: of the model.
        changed: where a forward changes it.
    """

    def __init__(self, modules: Sequence[nn.Module], changed: Iterable[tuple[int, str]]) -> None:
        self._places = [(vars(modules[layer]), layer, name) for layer, name in changed]

    def __enter__(self) -> None:
        self._before = [Place.of(*place) for place in self._places]

    def __exit__(self, *_: object) -> None:
        for place in self._before:
            if _holds_wrapped(place.own.get(place.name)):
                place.put_back()


def _held_by(module: nn.Module) -> list[tuple[dict[str, Any], Iterable[str]]]:
    """Returns the dicts of a module that a forward may change, each with the names in it."""
    buffers = held(module, "buffers")
    plain = vars(module), plain_names(module)
    return [(buffers, list(buffers)), plain] if isinstance(buffers, dict) else [plain]


def _copy_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    is_small_container = type(value) in (list, dict, set) and len(value) <= _MOST
    return value.copy() if is_small_container else None


def _changes_of(value: Any) -> int:
    return changes_of(value) if isinstance(value, Tensor) else 0


def _have_same(some: Any, others: Any) -> bool:
    """Returns whether two containers hold the same things."""
    if isinstance(some, dict):
        some, others = ([*each, *each.values()] for each in (some, others))
    return [id(value) for value in some] == [id(value) for value in others]


def _are_same(a: Any, b: Any) -> bool:
    """Returns whether two values are the same as far as can be told."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        return bool(torch.isclose(a, b, rtol=_SAME, atol=0, equal_nan=True).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_are_same, a, b))
    if type(a) is not type(b):
        return False
    return not isinstance(a, _COMPARABLE) or a == b


def _holds_wrapped(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_wrapped(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple, set)):
        return False
    return any(map(_holds_wrapped, value))
