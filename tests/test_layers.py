"""Every layer of ``torch.nn`` in every path: equal to the loop written out, or refused in words.

``docs/layers.md`` has the table; ``python tests/test_layers.py`` writes it.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from any_model import PATHS, assert_same, outcome, written_out
from every_layer import KINDS, NO_LAYERS, RECIPES, problem

PAGE = Path(__file__).parents[1] / "docs" / "layers.md"
BEGIN = "<!-- written by tests/test_layers.py -->\n"
# What a message must hold: what to do.
REMEDIES = {
    "chunk_size=1": "`chunk_size=1`",
    "second_order=False": "first order",
    "convert_norm": "`convert_norm`",
    "run one batch": "run a batch first",
}


@cache
def result(name: str, path: str, second_order: bool) -> str:
    """Returns nothing if it is right, the remedy if it is refused."""
    net, batch = problem(name)
    try:
        found = outcome(PATHS[path], net, batch, second_order=second_order)
    except (RuntimeError, ValueError) as error:
        remedies = [words for part, words in REMEDIES.items() if part in str(error)]
        if not remedies:
            raise
        return remedies[0]
    net, batch = problem(name)
    assert_same(found, outcome(written_out, net, batch, second_order=second_order))
    return ""


def test_every_layer_has_a_recipe() -> None:
    layers = {
        name
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    assert layers - NO_LAYERS.keys() <= RECIPES.keys()


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore")  # of torch, about layers it has better ones for
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in RECIPES if hasattr(nn, name)])
def test_a_layer_is_right_or_refused(name: str, path: str, second_order: bool) -> None:
    result(name, path, second_order)


def table() -> str:
    """Returns the tables of the page; of each kind the layers that are right everywhere first."""
    lines = []
    for kind, recipes in KINDS.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in recipes:
            alike.setdefault(tuple(cell(name, path) for path in PATHS), []).append(f"`{name}`")
        right = alike.pop(("yes",) * len(PATHS), [])
        lines += [f"### {kind}", ""]
        if right:
            lines += [f"Right in every path and both orders: {', '.join(right)}.", ""]
        if alike:
            lines += [
                "| layer | " + " | ".join(PATHS) + " |",
                "|---" * (len(PATHS) + 1) + "|",
                *(
                    f"| {', '.join(names)} | {' | '.join(cells)} |"
                    for cells, names in alike.items()
                ),
                "",
            ]
    return "\n".join(lines)


def cell(name: str, path: str) -> str:
    second, first = (result(name, path, order) for order in (True, False))
    if second == first:
        return second or "yes"
    return f"{second or 'yes'}; first order: {first or 'yes'}".replace(
        "first order; first order: yes", "first order alone"
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="the page is of the newest torch")
def test_the_page_is_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2] == table()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    sys.stdout.write(table())
    PAGE.write_text(before + BEGIN + table(), encoding="utf-8")
