"""Classes that layers get in place of their own, each a subclass of that."""

from __future__ import annotations

import copyreg
from functools import cache, wraps
from typing import Any

from torch import nn


class Made(nn.Module):
    """What all made classes share: an instance pickles and copies by what its class is made of."""

    _prefix = ""  # of the names of such classes
    made_of: tuple[type[Made], type[nn.Module]]

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what a forward of the layer's own class, or its call, returns."""
        return forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Says how to make it again: pickle would look the class up by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        by_class = reduced[0] is copyreg.__newobj__ and _is_made(type(self))  # type: ignore[attr-defined]
        return (_made, _parts(type(self)), *reduced[2:]) if by_class else reduced


def made_class(mixin: type[Made], kind: type[nn.Module]) -> type[Any]:
    """Returns the subclass of ``kind`` whose behaviour ``mixin`` changes, one for each pair."""
    pair: Any = mixin, kind
    return _made_class(*pair)  # type: ignore[no-any-return]


@cache
def _made_class(mixin: Any, kind: Any) -> Any:
    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(kind.forward, self, *args, **kwargs)

    about = {"made_of": (mixin, kind), "__module__": kind.__module__, "__doc__": kind.__doc__}
    if mixin.forward is nn.Module.forward:  # it has none of its own
        about["forward"] = forward
    named = mixin._prefix + kind.__name__
    return type(named, (mixin, kind), about)


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the class that a layer has, or had before it got a made one."""
    return layer.made_of[1] if isinstance(layer, Made) else type(layer)


def _is_made(kind: Any) -> bool:
    """Returns whether it is a made class, not a subclass that higher and others make of one."""
    return issubclass(kind, Made) and "made_of" in vars(kind)


def _parts(kind: Any) -> tuple[type[Any], ...]:
    """Returns what a made class is made of, the class of a layer that is none last."""
    mixin, inner = kind.made_of
    return (mixin, *_parts(inner)) if _is_made(inner) else (mixin, inner)


def _made(*parts: Any) -> Any:
    kind = parts[-1]
    for mixin in reversed(parts[:-1]):
        kind = made_class(mixin, kind)
    return kind.__new__(kind)
