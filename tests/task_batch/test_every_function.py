"""Every function of ``torch.nn.functional`` and every loss under vmap: right, or refused.

``docs/layers.md`` lists what is refused; this file, run as a script, writes the list.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from any_model import PATHS, assert_same, outcome, written_out
from every_function import FUNCTIONS, NOT_RUN, Applied

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
BEGIN = "<!-- written by tests/task_batch/test_every_function.py -->\n"
END = "<!-- end -->\n"
CASES = [(name, flag) for name, recipes in FUNCTIONS.items() for flag in recipes]
REMEDIES = ("chunk_size=1", "second_order=False")


def size_of_outputs(output: object, labels: Tensor) -> Tensor:
    """A loss whose second derivative by any output is not nothing."""
    floats = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum((t.square() + t - 0.1 * labels.mean() * t).mean() for t in floats)


@cache
def refused(name: str, flag: str, second_order: bool, equal: bool) -> str:
    """Returns nothing if it is right, the remedy if it is refused."""
    torch.manual_seed(1)
    recipe = FUNCTIONS[name][flag]
    net = Applied(recipe)
    x, x_target = (
        tuple(torch.stack([draw() for _ in range(3)]) for draw in recipe.inputs) for _ in range(2)
    )
    y = torch.randn(3, 1)
    if equal:
        x, x_target = (tuple(t[:1].expand_as(t).clone() for t in part) for part in (x, x_target))
        y = y[:1].expand_as(y).clone()
    batch = (x, y, x_target, y)
    try:
        found = outcome(
            PATHS["task_batch_loss"], net, batch, size_of_outputs, second_order=second_order
        )
    except RuntimeError as error:
        remedies = [remedy for remedy in REMEDIES if remedy in str(error)]
        if not remedies:
            raise
        return remedies[0]
    assert_same(found, outcome(written_out, net, batch, size_of_outputs, second_order=second_order))
    return ""


def test_every_function_has_a_recipe() -> None:
    functions = {
        name
        for name, function in vars(F).items()
        if not name.startswith("_")
        and callable(function)
        and not isinstance(function, type)
        and getattr(function, "__module__", None)
        in ("torch.nn.functional", "torch._C._nn", "torch._jit_internal", None, "torch")
    }
    assert functions - NOT_RUN.keys() <= FUNCTIONS.keys()


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore")  # of torch, about functions it has better ones for
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize(("name", "flag"), CASES)
def test_tasks_at_once_are_tasks_in_turn(
    name: str, flag: str, second_order: bool, equal: bool
) -> None:
    if not hasattr(F, name):
        pytest.skip("this torch does not have it")
    refused(name, flag, second_order, equal)


def listing() -> str:
    """Returns the lines of the page: the functions that are refused, by the remedy."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, recipes in FUNCTIONS.items():
        ways = {
            flag: (refused(name, flag, False, False), refused(name, flag, True, False))
            for flag in recipes
        }
        for how in dict.fromkeys(way for way in ways.values() if any(way)):
            flags = [flag for flag, way in ways.items() if way == how]
            words = "" if len(flags) == len(ways) else f" ({', '.join(flags)})"
            found.setdefault(how, []).append(f"`{name}`{words}")
    heads = {
        ("chunk_size=1", "chunk_size=1"): "With `chunk_size=1` alone",
        ("", "chunk_size=1"): "With `chunk_size=1` alone in second order",
        ("", "second_order=False"): "In first order alone",
        ("chunk_size=1", "second_order=False"): "In first order and with `chunk_size=1` alone",
    }
    return "".join(f"- {heads[how]}: {', '.join(names)}.\n" for how, names in found.items())


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="the page is of the newest torch")
def test_the_page_is_what_was_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == listing()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    sys.stdout.write(listing())
    PAGE.write_text(before + BEGIN + listing() + END + rest.partition(END)[2], encoding="utf-8")
