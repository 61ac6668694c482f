"""The plain attributes of a model: what a forward assigned on higher's copies comes back.

Not what higher itself assigns there: ``_flat_weights``, the adapted weights of recurrent layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mamlpp_ext.norm import References
from mamlpp_ext.torch_private import plain_names

_OF_HIGHER = {"_flat_weights"}
_MISSING = object()


class AttributeCopies:
    """The plain attributes of a model and the copies that its patched twin works on.

    Args:
        pairs: each module of the model, and its twin.
        references: by which what refers to the modules was made to refer to the twins.
    """

    def __init__(
        self, pairs: Iterable[tuple[nn.Module, nn.Module]], references: References
    ) -> None:
        self._pairs = [(module, twin, vars(twin).copy()) for module, twin in pairs]
        self._references = references

    def write_back(self) -> None:
        """Does to the model's attributes what was done to the copies.

        Values are what they are, a graph included, as in plain torch; those that refer to twins
        refer to the model's own modules again.
        """
        back = self._references.reversed({id(twin): module for module, twin, _ in self._pairs})
        for old, new in self._references.containers():
            _fill(old, new, back)
        for module, twin, before in self._pairs:
            own, now = vars(module), vars(twin)
            for name in plain_names(module) & before.keys() - now.keys():
                del own[name]
            for name in plain_names(twin) - _OF_HIGHER:
                # What only the twin had from the beginning is higher's.
                known = name in own or name not in before
                if known and now[name] is not before.get(name, _MISSING):
                    _assign(module, name, back.moved(now[name]))


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):  # registers it
        setattr(module, name, value)
    else:
        vars(module)[name] = value


def _fill(old: Any, new: Any, back: References) -> None:
    """Gives a container the content of its copy, in place, if that has become another."""
    content, _ = back.each(new)
    if isinstance(old, dict):
        values, _ = back.each(new.values())
        if not _are([*old, *old.values()], [*content, *values]):
            old.clear()
            old.update(zip(content, values, strict=True))
    elif not _are(old, content):
        old.clear()
        (old.extend if isinstance(old, list) else old.update)(content)


def _are(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return [id(value) for value in some] == [id(value) for value in others]
