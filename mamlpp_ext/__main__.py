"""``mamlpp-ext check package.module:make_model``: what MAML++ would do to a model.

``mamlpp-ext benchmark package.module:make_model``: what it costs. ``python -m mamlpp_ext`` is the
same, where the script is not in the path.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mamlpp_ext.check_setup.model import Trial, describe, loss_of_logits, noise_of
from mamlpp_ext.task_batch import Loss, Tasks, checked_batch

_CHECK = "what would be converted, adapted and learned"
_BENCHMARK = "time and memory of MAML and MAML++, in every loop that is installed"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags, but for those of the benchmark, which has its own."""
    parser = argparse.ArgumentParser(
        prog="mamlpp-ext",
        description="What MAML++ would do to a model, and what it costs.",
        epilog="Exit codes: 0; 1 if check finds a problem; 2 for wrong arguments. The same as "
        "python -m mamlpp_ext.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=_CHECK, description=_CHECK)
    commands.add_parser("benchmark", help=_BENCHMARK, add_help=False)
    add = check.add_argument
    add("model", help="package.module:name of a model, or of a function that returns one")
    add("--steps", type=int, default=5, help="inner steps (%(default)s)")
    add("--adapt", nargs="+", metavar="PATTERN", help="what the inner loop adapts, as in LSLR")
    add(
        "--shape",
        help="of one input, such as 1,28,28: runs an inner loop on noise too, and says which "
        "parameters no gradient reaches",
    )
    add_batch(check)
    return parser


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


def make_trial(shape: str | None, batch: str | None, loss: str | None) -> Trial | None:
    """Returns what to try an inner loop on: noise, the first task of a batch, or nothing.

    Raises:
        ImportError: if there is no such module or name.
        TypeError: if a name is of something else.
        ValueError: if the flags contradict each other, or are of another form.
    """
    check_one_source(shape, batch, loss)
    if batch is not None:
        return Trial(load_batch(batch).single().batch(), load_loss(loss))
    sizes = read_shape(shape)
    return None if sizes is None else noise_of(sizes)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 if the findings name a problem."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["benchmark"]:
        # By name, as it imports what is here.
        benchmark = importlib.import_module("mamlpp_ext.benchmark.__main__")
        return int(benchmark.main(given[1:]))
    parser = make_parser()
    flags = parser.parse_args(given)
    try:
        model, trial = load_model(flags.model), make_trial(flags.shape, flags.batch, flags.loss)
        lines = list(describe(model, flags.steps, flags.adapt, trial))
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    sys.stdout.write("\n".join(lines) + "\n")
    return int(any(line.startswith("problem:") for line in lines))


def script() -> int:
    """Runs the command as ``mamlpp-ext``, with the modules of this folder, as python -m has it."""
    sys.path.insert(0, os.getcwd())
    return main()


if __name__ == "__main__":
    raise SystemExit(main())
