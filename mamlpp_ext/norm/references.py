"""What refers to modules that are replaced, and copies that refer to their own."""

from __future__ import annotations

import copy
import dis
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from mamlpp_ext.norm.containers import MOST, parts_of
from mamlpp_ext.torch_private import held


def copied(module: nn.Module) -> nn.Module:
    """Returns a copy of a model, in which functions too refer to the copied layers.

    ``copy.deepcopy`` leaves functions as they are, and what they capture with them: a wrapped
    ``forward`` of the copy would call the original.

    Raises:
        ValueError: if it cannot be copied.
    """
    try:
        new = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"this {type(module).__name__} cannot be copied, which conversion begins with: "
            f"{_in_the_way(module) or error}; delete that first (a tensor may be kept detached), "
            "and set it on the converted model; for the old torch.nn.utils.weight_norm, which "
            "keeps a weight with a graph, take torch.nn.utils.parametrizations.weight_norm"
        ) from error
    layers = dict(new.named_modules())
    follow(new, {id(old): layers[path] for path, old in module.named_modules() if path in layers})
    return new


def follow(module: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Lets what the layers of a model hold refer to what replaces some modules, in place."""
    references = References(replaced)
    for layer in module.modules():
        own = vars(layer)
        own.update({name: references.moved(value) for name, value in own.items()})


def _in_the_way(module: nn.Module) -> str:
    layers = list(module.modules())
    for path, layer in module.named_modules():
        own = {**vars(layer), **held(layer, "parameters"), **held(layer, "buffers")}
        for name, value in reversed(own.items()):  # what holds all parameters comes last
            try:
                copy.deepcopy(value, {id(other): other for other in layers})
            except Exception as error:
                where = f"{path}.{name}".lstrip(".")
                return f"'{where}' is in the way, of type {type(value).__name__} ({error})"
    return ""


def parts_looked_into(value: Any) -> Collection[Any] | None:
    """Returns what :class:`References` looks at in a value; None where it does not look."""
    if type(value) not in _MOVES:
        return None
    if isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]  # assigned so far
        contents = [cell.cell_contents for cell in cells]
        return [*contents, value.__defaults__, value.__kwdefaults__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    return parts_of(value)


class References:
    """Turns what refers to modules, or to buffers, into what refers to those that replace them.

    It looks into bound methods, functions with what they capture, partials, weak references and
    containers, not into other objects.

    Args:
        replaced: what stands for each of them, by its id.

    Attributes:
        global_names: those by which functions name modules, and which stay what they are.
    """

    def __init__(self, replaced: Mapping[int, Any]) -> None:
        self.global_names: set[str] = set()
        self._replaced = replaced
        self._moved: dict[int, tuple[Any, Any]] = {}

    def moved(self, value: Any) -> Any:
        """Returns ``value`` itself if it refers to none of the modules, else what it becomes."""
        move = _MOVES.get(type(value))
        if move is None:
            return self._replaced.get(id(value), value)
        # Most containers are empty, large ones hold data, and every inner loop comes by here.
        if not value or (isinstance(value, Sized) and len(value) > MOST):
            return value
        if id(value) not in self._moved:
            self._moved[id(value)] = value, value  # where it is met within itself
            self._moved[id(value)] = value, move(self, value)
        return self._moved[id(value)][1]

    def each(self, values: Iterable[Any]) -> tuple[list[Any], bool]:
        """Returns the values moved, and whether any has become another."""
        pairs = [(value, self.moved(value)) for value in values]
        return [new for _, new in pairs], any(new is not value for value, new in pairs)

    def containers(self) -> list[tuple[Any, Any]]:
        """Returns each list, set and dict that became another, and that other."""
        return [
            (old, new)
            for old, new in self._moved.values()
            if new is not old and isinstance(old, (list, set, dict))
        ]

    def reversed(self, replaced: Mapping[int, Any]) -> References:
        """Returns what turns all this back, and anything else that refers to what came.

        Args:
            replaced: what was replaced, by the ids of what replaced it.
        """
        back = References(replaced)
        changed = ((old, new) for old, new in self._moved.values() if new is not old)
        back._moved = {id(new): (new, old) for old, new in changed}
        return back

    def find_globals(self, function: FunctionType) -> None:
        """Takes note of the modules that a function names as globals."""
        code, known = function.__code__, function.__globals__
        if any(id(known.get(name)) in self._replaced for name in code.co_names):
            read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            self.global_names |= {name for name in read if id(known.get(name)) in self._replaced}


def _move_values(references: References, values: Any) -> Any:
    new, changed = references.each(values)
    return type(values)(new) if changed else values


def _move_dict(references: References, values: dict[Any, Any]) -> Any:
    keys, other_keys = references.each(values)
    new, changed = references.each(values.values())
    if not (changed or other_keys):
        return values
    copy = values.copy()  # of the same kind, with its default
    copy.clear()
    copy.update(zip(keys, new, strict=True))
    return copy


def _move_method(references: References, method: MethodType) -> Any:
    owner = references.moved(method.__self__)
    if owner is method.__self__:
        return method
    # What replaces it may have a forward of its own, which need not be called so.
    function = method.__func__
    for name in (method.__name__, "forward"):
        if getattr(type(method.__self__), name, None) is function:
            return MethodType(getattr(type(owner), name), owner)
    return MethodType(function, owner)


def _move_partial(references: References, old: partial[Any]) -> Any:
    (function, *args), changed = references.each([old.func, *old.args])
    keywords = references.moved(old.keywords)
    if not changed and keywords is old.keywords:
        return old
    return _dressed_as(references, partial(function, *args, **keywords), old)


def _move_function(references: References, old: FunctionType) -> Any:
    """Returns the function with cells of its own for the modules that it captures."""
    references.find_globals(old)
    cells, captured = list(old.__closure__ or ()), False
    for i, cell in enumerate(cells):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if (new := references.moved(content)) is not content:
            cells[i], captured = CellType(new), True
    defaults = references.moved(old.__defaults__)
    keywords = references.moved(old.__kwdefaults__)
    if not captured and defaults is old.__defaults__ and keywords is old.__kwdefaults__:
        return old
    function = FunctionType(
        old.__code__, old.__globals__, old.__name__, defaults, tuple(cells) or None
    )
    function.__kwdefaults__ = keywords
    return _dressed_as(references, function, old)


def _dressed_as(references: References, new: Any, old: Any) -> Any:
    vars(new).update(references.moved(vars(old)))
    return new


def _move_reference(references: References, reference: weakref.ref[Any]) -> Any:
    target = reference()
    twin = references.moved(target)
    return reference if twin is target else weakref.ref(twin)


_MOVES: dict[type, Callable[[References, Any], Any]] = {
    **dict.fromkeys((list, tuple, set, frozenset), _move_values),
    **dict.fromkeys((dict, OrderedDict, defaultdict), _move_dict),
    MethodType: _move_method,
    partial: _move_partial,
    FunctionType: _move_function,
    weakref.ref: _move_reference,
}
