"""``mamlpp-ext check package.module:make_model``: what MAML++ would do to a model.

``mamlpp-ext benchmark package.module:make_model``: what it costs. ``python -m mamlpp_ext`` is the
same, where the script is not in the path.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from mamlpp_ext.check_setup.model import Trial, describe, noise_of
from mamlpp_ext.check_setup.named import (
    add_batch,
    check_one_source,
    load_batch,
    load_loss,
    load_model,
    read_shape,
)

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
        # Only now: it takes as long to import as all else, and stands above this file.
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
