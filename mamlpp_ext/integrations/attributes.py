"""The plain attributes of a model: what a forward assigned on higher's copies comes back.

Not what higher itself assigns there: ``_flat_weights``, the adapted weights of recurrent layers.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.integrations.twins import Twins
from mamlpp_ext.norm import References, all_in, fill, ids_in, parts_of
from mamlpp_ext.torch_private import hooks_of, plain_names

_OF_HIGHER = {"_flat_weights"}
_MISSING = object()
_PLAIN = (Tensor, Number, str, bytes, type(None), torch.dtype, torch.device, torch.Generator)


class AttributeCopies:
    """The plain attributes of a model and the copies that its patched twin works on.

    Args:
        twins: what stands for what in the patched model.
    """

    def __init__(self, twins: Twins) -> None:
        self._pairs = [(module, twin, vars(twin).copy()) for module, twin in twins.pairs]
        self._containers = [(old, new, new.copy()) for old, new in twins.references.containers()]
        self._back, self._hooks = twins.back, self._count_hooks()

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
            if ids_in(new) != ids_in(before):
                fill(old, _moved_back(new, back))
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


def _is_data(value: Any) -> bool:
    """Returns whether a value holds no module, however deep."""
    return all(
        isinstance(thing, _PLAIN) or hasattr(thing, "tobytes") or parts_of(thing) is not None
        for thing in all_in(value)
    )


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, nn.Parameter):  # registers it
        setattr(module, name, value)
    else:
        vars(module)[name] = value


def _moved_back(container: Any, back: References) -> Any:
    content, _ = back.each(container)
    if not isinstance(container, dict):
        return content
    values, _ = back.each(container.values())
    return dict(zip(content, values, strict=True))
