"""What the flags of the commands name: a model, a batch, a loss, the shape of an input."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mamlpp_ext.check_setup.model import loss_of_logits
from mamlpp_ext.task_batch import Loss, Tasks, checked_batch


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a batch of the user's own."""
    parser.add_argument(
        "--batch",
        help="package.module:name of a function without arguments, in place of --shape: it returns "
        "(x_support, y_support, x_target, y_target) as task_batch_loss takes them, stacked along "
        "the tasks; inputs are a tensor, a tuple or a dict by name",
    )
    parser.add_argument(
        "--loss",
        help="package.module:name of a function of an output and labels, for --batch (the cross "
        "entropy of the output, or of its .logits)",
    )


def load_model(place: str) -> nn.Module:
    """Returns the model at ``package.module:name``, calling what is there if it is no model.

    Raises:
        ImportError: if there is no such module or name.
        TypeError: if what is there is no model and returns none, or takes arguments.
        ValueError: if ``place`` is not of that form.
    """
    model = _named(place)
    if not isinstance(model, nn.Module) and callable(model):
        _check_no_arguments(place, model, "model")
        model = model()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{place} gave a {type(model).__name__}; name a torch.nn.Module, or a function that "
            "returns one without arguments"
        )
    return model


def load_batch(place: str) -> Tasks:
    """Returns the meta-batch that the function at ``package.module:name`` makes.

    Raises:
        ImportError: as :func:`load_model`.
        TypeError: if what is there is no function, or takes arguments.
        ValueError: if it returns no meta-batch.
    """
    make = _named(place)
    if not callable(make) or isinstance(make, nn.Module):
        raise TypeError(
            f"--batch {place} is a {type(make).__name__}; name a function without arguments that "
            "returns (x_support, y_support, x_target, y_target)"
        )
    _check_no_arguments(place, make, "batch")
    try:
        return checked_batch(make())
    except ValueError as error:
        raise ValueError(f"--batch {place} returned no meta-batch: {error}") from error


def load_loss(place: str | None) -> Loss:
    """Returns the loss at ``package.module:name``, for None the cross entropy of logits.

    Raises:
        ImportError: as :func:`load_model`.
        TypeError: if what is there cannot be called.
    """
    loss: Any = loss_of_logits if place is None else _named(place)
    if not callable(loss):
        raise TypeError(
            f"--loss {place} is a {type(loss).__name__}; name a function of an output and labels"
        )
    return loss  # type: ignore[no-any-return]


def _named(place: str) -> Any:
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{place!r} is not of the form package.module:name")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"module {module} has no {name!r}; it defines {_public(found)}")
    return getattr(found, name)


def _check_no_arguments(place: str, make: Callable[..., Any], what: str) -> None:
    try:
        signature = inspect.signature(make)
    except ValueError:  # of some built-in classes nothing is known
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{place} takes arguments ({error}); name a function without arguments that returns "
            f"the {what}, such as 'def make_{what}(): return {make.__name__}(...)', as "
            f"{place.partition(':')[0]}:make_{what}"
        ) from None


def read_shape(text: str | None) -> tuple[int, ...] | None:
    """Returns the shape that ``1,28,28`` means, None for None.

    Raises:
        ValueError: if ``text`` is not of that form.
    """
    if text is None:
        return None
    if not all(size.isdecimal() and int(size) for size in text.split(",")):
        raise ValueError(
            f"--shape must be whole numbers of at least 1 with commas between, got {text!r}; give "
            "the shape of one input without the batch, such as 1,28,28"
        )
    return tuple(map(int, text.split(",")))


def _public(module: object) -> str:
    return ", ".join(name for name in vars(module) if not name.startswith("_")) or "nothing"


def check_one_source(shape: str | None, batch: str | None, loss: str | None) -> None:
    """Says what is wrong if inputs come from two sources, or a loss without a batch.

    Raises:
        ValueError: if so.
    """
    if shape is not None and batch is not None:
        raise ValueError(
            f"--shape {shape} makes noise and --batch {batch} makes a batch; leave one of them out"
        )
    if loss is not None and batch is None:
        raise ValueError(
            f"--loss {loss} needs labels, which only --batch has; name the function of a batch"
        )
