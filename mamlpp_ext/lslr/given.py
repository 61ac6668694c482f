"""Parameters and gradients as an update is given them: by name, or in the order of the names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from mamlpp_ext.checks import listing

Grads = Mapping[str, Tensor | None] | Sequence[Tensor | None]
Value = TypeVar("Value")


def by_name(
    names: Sequence[str], given: Mapping[str, Value] | Sequence[Value], what: str
) -> dict[str, Value]:
    """Returns what was given by name.

    Args:
        names: of the adapted parameters.
        given: by name, at least these; or one for each of these, in their order.
        what: the argument's name, for messages.

    Raises:
        KeyError: if a name is missing.
        TypeError: if it is neither a dict nor a sequence.
        ValueError: if a sequence is longer or shorter than the names.
    """
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise KeyError(
                f"{what} lacks {listing(missing)} (it has {listing(list(given))}); pass every "
                "adapted parameter by its name in named_parameters(), a missing gradient as None"
            )
        return dict(given)
    anything: Any = given
    if not isinstance(anything, Sequence) or isinstance(anything, str):
        raise TypeError(
            f"{what} must be a dict by name, or a list in the order of lslr.names, got "
            f"{type(anything).__name__}; pass dict(model.named_parameters()), or "
            "[*lslr.parameters_of(model).values()]"
        )
    if len(given) != len(names):
        raise ValueError(
            f"{what} has {len(given)} tensors, LSLR adapts {len(names)} ({listing([*names])}); "
            "pass one for each of these, in this order, or a dict by name"
        )
    return dict(zip(names, given, strict=True))
