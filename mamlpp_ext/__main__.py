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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.check_setup import check_setup
from mamlpp_ext.lslr import LSLR, functional_call
from mamlpp_ext.norm import convert_batchnorm
from mamlpp_ext.steps import inner_steps, per_step_layers
from mamlpp_ext.torch_private import is_batch_norm

_OF_THE_LOOP = ("(MSL)", "(DA)", "(CA)")  # findings that say nothing of a model
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
    return parser


def load_model(place: str) -> nn.Module:
    """Returns the model at ``package.module:name``, calling what is there if it is no model.

    Raises:
        ImportError: if there is no such module or name.
        TypeError: if what is there is no model and returns none, or takes arguments.
        ValueError: if ``place`` is not of that form.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{place!r} is not of the form package.module:name")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ImportError(f"module {module} has no {name!r}; it defines {_public(found)}")
    model = getattr(found, name)
    if not isinstance(model, nn.Module) and callable(model):
        _check_no_arguments(place, model)
        model = model()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{place} gave a {type(model).__name__}; name a torch.nn.Module, or a function that "
            "returns one without arguments"
        )
    return model


def _check_no_arguments(place: str, make: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(make)
    except ValueError:  # of some built-in classes nothing is known
        return
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{place} takes arguments ({error}); name a function without arguments that returns "
            f"the model, such as 'def make_model(): return {make.__name__}(...)', as "
            f"{place.partition(':')[0]}:make_model"
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


def describe(
    model: nn.Module, steps: int, adapt: list[str] | None, shape: tuple[int, ...] | None
) -> Iterator[str]:
    """Yields the lines of the report: converted layers, rates, parameters, findings."""
    net = model
    if any(is_batch_norm(layer) for layer in model.modules()):
        net = convert_batchnorm(model, steps)
    for name, layer in per_step_layers(net).items():
        features = getattr(layer, "num_features", None)  # of a norm; others have them by name
        what = ", ".join(layer.per_step_names) if features is None else f"{features} features"
        yield f"per-step: '{name}', {what}, {layer.num_steps} rows"
    lslr = LSLR(net, steps, adapt=adapt)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()])
    for name, p in net.named_parameters():
        learner = "adapted" if name in lslr.names else "outer loop alone"
        yield f"{learner if p.requires_grad else 'frozen'}: '{name}', {tuple(p.shape)}"
    yield f"rates: {lslr.rates.numel()}, {len(lslr.names)} tensors times {steps} steps"
    if shape is not None:
        _run_inner_loop(net, lslr, shape).backward()  # type: ignore[no-untyped-call]
    for finding in check_setup(net, lslr, meta_opt):
        if not any(part in finding for part in _OF_THE_LOOP):
            yield finding


def _run_inner_loop(net: nn.Module, lslr: LSLR, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(8, *shape)
    params: dict[str, Tensor] = dict(net.named_parameters())
    losses = []
    for step in inner_steps(net, lslr.num_steps):
        wanted = {name: params[name] for name in lslr.names}
        output = functional_call(net, params, x)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returned a {type(output).__name__}, --shape needs one that returns a "
                "tensor; leave --shape out, or name a wrapper that returns the logits alone"
            )
        support_loss = output.square().mean()
        grads = torch.autograd.grad(
            support_loss, [*wanted.values()], create_graph=True, allow_unused=True
        )
        params = lslr.update(params, dict(zip(wanted, grads, strict=True)), step)
        losses.append(functional_call(net, params, x).square().mean())
    return torch.stack(losses).mean()


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
        model, shape = load_model(flags.model), read_shape(flags.shape)
        lines = list(describe(model, flags.steps, flags.adapt, shape))
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
