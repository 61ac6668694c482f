"""The plain attributes of a model: what a forward assigned on higher's copies comes back.

Not what higher itself assigns there: ``_flat_weights``, the adapted weights of recurrent layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.norm import References
from mamlpp_ext.torch_private import hooks_of, plain_names

_OF_HIGHER = {"_flat_weights"}
_MISSING = object()
_DEEPEST = 4
_PLAIN = (Tensor, Number, str, bytes, type(None), torch.dtype, torch.device, torch.Generator)


class AttributeCopies:
    """The plain attributes of a model and the copies that its patched twin works on.

    Args:
        pairs: each module of the model, and its twin.
        references: what made that which refers to the modules refer to the twins.
        back: what turns that back.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Module, nn.Module]],
        references: References,
        back: References,
    ) -> None:
        self._pairs = [(module, twin, vars(twin).copy()) for module, twin in pairs]
        self._containers = [(old, new, new.copy()) for old, new in references.containers()]
        self._back, self._hooks = back, self._count_hooks()

    def _count_hooks(self) -> int:
        return sum(len(hooks) for _, twin, _ in self._pairs for hooks in hooks_of(twin).values())

    def write_back(self) -> None:
        """Does to the model's attributes what was done to the copies.

        Values are what they are, a graph included, as in plain torch; what refers to twins refers
        to the model's own modules again. What may refer to them where it cannot be followed, in an
        object, stays with the twins, and so do flags where hooks were registered: they end, too.
        """
        back = self._back
        for old, new, before in self._containers:
            if not _hold_the_same(new, before):
                _fill(old, new, back)
        flags_stay = self._count_hooks() > self._hooks
        for module, twin, before in self._pairs:
            own, now = vars(module), vars(twin)
            for name in plain_names(own) & before.keys() - now.keys():
                del own[name]
            for name in plain_names(now) - _OF_HIGHER:
                # What only the twin had from the beginning is higher's.
                known = name in own or name not in before
                changed = now[name] is not before.get(name, _MISSING)
                if known and changed and not (flags_stay and isinstance(now[name], bool)):
                    value = back.moved(now[name])
                    if value is not now[name] or _is_data(value):
                        _assign(module, name, value)


def _is_data(value: Any, depth: int = _DEEPEST) -> bool:
    """Returns whether a value holds no module, however deep."""
    if isinstance(value, _PLAIN) or hasattr(value, "tobytes"):
        return True
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    elif not isinstance(value, (list, tuple, set, frozenset, deque)):
        others = isinstance(value, (nn.Module, type)) or callable(value)
        if others or not hasattr(value, "__dict__"):
            return False
        value = vars(value).values()
    return depth > 0 and all(_is_data(each, depth - 1) for each in value)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):  # registers it
        setattr(module, name, value)
    else:
        vars(module)[name] = value


def _fill(old: Any, new: Any, back: References) -> None:
    """Gives a container the content of its copy, in place."""
    content, _ = back.each(new)
    if isinstance(old, dict):
        values, _ = back.each(new.values())
        content = [*zip(content, values, strict=True)]
    old.clear()
    (old.extend if isinstance(old, list) else old.update)(content)


def _hold_the_same(some: Any, others: Any) -> bool:
    if isinstance(some, dict):
        some, others = ([*each, *each.values()] for each in (some, others))
    return [id(value) for value in some] == [id(value) for value in others]
