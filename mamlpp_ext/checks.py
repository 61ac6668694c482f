"""Checks of what is asked for in many places, and how their messages list names."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any, Literal

from torch import Tensor

ExtraSteps = Literal["error", "last"]
# The oldest that works and the newest that the tests have run with.
TESTED = {
    "torch": ((2, 6), (2, 15)),
    "higher": ((0, 2, 1), (0, 2, 1)),
    "torchopt": ((0, 7, 3), (0, 7, 3)),
}


def check_version(owner: str, package: str, version: str | None = None) -> None:
    """Refuses a package that is too old, and warns of one that is newer than the tested ones.

    Args:
        owner: the module that needs it, called as that is imported.
        package: its name, one of those in ``TESTED``.
        version: its version, None to look it up; without a number it counts as new.
    """
    if version is None:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "a copy without metadata"
    oldest, newest = TESTED[package]
    number = re.match(r"\d+(?:\.\d+)*", version)
    found = tuple(map(int, number[0].split("."))) if number else (*newest, 0)
    least, most = (".".join(map(str, tested)) for tested in (oldest, newest))
    if found < oldest:
        raise ImportError(
            f"{owner} needs {package} from {least} on, found {version}; "
            f"pip install '{package}>={least}'"
        )
    if number is None or found[: len(newest)] > newest:
        tested = least if least == most else f"{least} to {most}"
        warnings.warn(
            f"{owner} was tested with {package} {tested}, found {version}, which may have changed "
            f"what it relies on; pip install '{package}=={most}.*', or look for a newer "
            "mamlpp_ext. warnings.filterwarnings('ignore', 'mamlpp_ext') goes on without warning",
            stacklevel=3,
        )


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """Returns ``value`` as an int of at least ``least``, or says what is wrong with it."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a whole number of at least {least}, got {value!r} "
            f"of type {type(value).__name__}; pass an int"
        )
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}; pass a larger one")
    return number


def checked_order(value: Any) -> bool:
    """Returns ``value``, a ``second_order``, if it is True or False, numpy's and torch's too."""
    if not (isinstance(value, (bool, int)) or hasattr(value, "__array__")):
        raise TypeError(
            f"second_order must be True or False, got {value!r} of type {type(value).__name__}; "
            "pass e.g. da.second_order of a DerivativeOrderAnnealing da"
        )
    return bool(value)


def checked_loss(loss: Any) -> Tensor:
    """Returns ``loss``, a support loss, if an inner step can differentiate it."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"step takes the support loss, a 0-dim tensor, got {loss!r} of type "
            f"{type(loss).__name__}; pass the loss itself, not loss.item()"
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "the support loss has no graph, so nothing can be adapted by it; leave torch.no_grad() "
            "and inference_mode() out of the inner loop (to evaluate without meta-gradients pass "
            "second_order=False, or track_higher_grads=False in higher), and detach() out of the "
            "forward"
        )
    return loss


def checked_extra_steps(value: str) -> ExtraSteps:
    """Returns ``value`` if it is a policy for steps beyond the trained ones."""
    if value not in ("error", "last"):
        raise ValueError(
            f"extra_steps must be 'error' or 'last', got {value!r}: 'error' refuses steps beyond "
            "num_steps, 'last' reuses the last row for them"
        )
    return value  # type: ignore[return-value]


def select_row(step: int, num_steps: int, extra_steps: ExtraSteps, owner: str) -> int:
    """Returns the row (or column) of a per-step table that inner step ``step`` uses."""
    if 0 <= step < num_steps:
        return step
    if step >= num_steps and extra_steps == "last":
        return num_steps - 1
    raise ValueError(
        f"inner step {step} is out of range for {owner} with num_steps={num_steps} (legal: 0 to "
        f"{num_steps - 1}); take fewer steps, build it with num_steps={max(step + 1, 1)}, or with "
        "extra_steps='last' to reuse its last row"
    )


def chosen_names(argument: str, choice: Any, names: list[str]) -> list[str]:
    """Returns those of ``names`` that an argument chooses: a callable, or fnmatch patterns.

    Args:
        argument: what it is called, for messages.
        choice: a callable of the name, a pattern or several.
        names: of all parameters that require grad.

    Raises:
        TypeError: if it is something else.
        ValueError: if a pattern matches nothing.
    """
    if callable(choice):
        return [name for name in names if choice(name)]
    patterns = [choice] if isinstance(choice, str) else choice
    patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    for pattern in patterns:
        if not isinstance(pattern, str):
            none = "None, " if argument == "adapt" else ""
            raise TypeError(
                f"{argument} must be {none}a callable of the name, or fnmatch patterns such as "
                f"['head.*'], got {pattern!r} of type {type(pattern).__name__}"
            )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no parameter that requires grad; there "
                f"are {listing(names)}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def listing(names: list[str], most: int = 8) -> str:
    """Writes names for a message, the first few of many."""
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
