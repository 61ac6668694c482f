"""The tables of bad input, one for each room: what a row is, the test of it, models to do it to."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

Net = nn.Module
Build = Callable[[], Net]
Act = Callable[[Net], Any]
# What is done to a model, the exception, and words of its message.
Row = tuple[Act, type[Exception], tuple[str, ...]]
# The same after what builds the model, by the name of the row.
Table = dict[str, tuple[Build, Act, type[Exception], tuple[str, ...]]]


def done_to(build: Build, rows: dict[str, Row], prefix: str = "") -> Table:
    """Returns the table of rows that are all done to the same model."""
    return {f"{prefix}{name}": (build, *row) for name, row in rows.items()}


def checked(table: Table) -> Callable[..., None]:
    """Returns the test of every row: its very exception, all of its words, nothing changed."""

    @pytest.mark.parametrize(
        ("build", "act", "error", "words"),
        [pytest.param(*row, id=name) for name, row in table.items()],
    )
    def test_bad_input(
        build: Build, act: Act, error: type[Exception], words: tuple[str, ...], unchanged: Any
    ) -> None:
        net = build()
        with unchanged(net), pytest.raises(error) as info:
            act(net)
        assert type(info.value) is error, repr(info.value)
        message = str(info.value.args[0])  # str() of a KeyError is quoted
        assert not [word for word in words if word not in message], message

    return test_bad_input


def every_table() -> Table:
    """Returns the rows of all rooms."""
    every: Table = {}
    for number, path in enumerate(sorted(Path(__file__).parent.rglob("test_errors.py"))):
        spec = importlib.util.spec_from_file_location(f"error_table_{number}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not every.keys() & module.TABLE.keys(), path
        every |= module.TABLE
    return every


def plain() -> nn.Module:
    """A model that convert_batchnorm takes."""
    layers = {"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(layers))


def per_step() -> nn.Module:
    """A model of three rows; what most rows of the table are about."""
    net = mpp.convert_batchnorm(plain(), 3)
    net.norm.running_mean.fill_(1.0)  # zeros would hide that a failure scaled them
    return net


def without_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def batch(tasks: int = 2, support: int = 4, target: int = 5) -> list[Tensor]:
    sizes = ((tasks, support), (tasks, target))
    return [
        t for size in sizes for t in (torch.randn(*size, 3), torch.zeros(size, dtype=torch.long))
    ]


def run(net: Net, *, data: Any = None, loss: Any = F.cross_entropy, **settings: Any) -> Any:
    lslr = settings.pop("lslr", None) or mpp.LSLR(net, 3)
    settings = {"num_steps": 3, **settings}
    return mpp.task_batch_loss(net, lslr, batch() if data is None else data, loss, **settings)


class Pair(nn.Linear):
    """A model that returns two things."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input
