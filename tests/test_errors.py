"""Every bad input ends in a built-in exception that helps, and changes nothing.

A message names what it got, what is legal, and what to do about it: the words of each row. Here are
the rows of what belongs to no room; those of a room stand beside its other tests.
"""

from __future__ import annotations

import runpy
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import mamlpp_ext as mpp
from error_tables import Net, Pair, Row, Table, checked, done_to, every_table, per_step
from mamlpp_ext.check_setup import model as described
from mamlpp_ext.check_setup import named
from mamlpp_ext.torch_private import transforms

pytestmark = pytest.mark.usefixtures("float64")


def forward_at(net: Net, step: int) -> None:
    with mpp.at_step(net, step):
        net(torch.randn(4, 3))


def two_loops(net: Net) -> None:
    older, newer = mpp.inner_steps(net, 3), mpp.inner_steps(net, 3)
    next(older)
    next(newer)
    next(older)


def import_with_torch(version: str) -> None:
    with mock.patch.object(torch, "__version__", version):
        runpy.run_path(mpp.__file__)


def forward_mode_without_its_part(net: Net) -> None:
    """As with a torch that has moved a private part that forward mode cannot do without."""
    x, lacking = torch.randn(4, 3), SimpleNamespace(_current_level=0)
    with warnings.catch_warnings(), mpp.frozen_statistics(net):
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its first jvp
        with mock.patch.object(transforms, "forward_ad", lacking):
            torch.func.jvp(net, (x,), (x,))


STEPS: dict[str, Row] = {
    "loop 0 steps": (lambda n: mpp.inner_steps(n, 0), ValueError, ("num_steps", "at least 1")),
    "loop -3 steps": (lambda n: mpp.inner_steps(n, -3), ValueError, ("num_steps", "got -3")),
    "loop 2.0 steps": (lambda n: mpp.inner_steps(n, 2.0), TypeError, ("num_steps", "got 2.0")),
    "loop over parameters": (
        lambda n: mpp.inner_steps(n.parameters(), 3),
        TypeError,
        ("expected the model", "of type generator", "pass the model itself"),
    ),
    "loop 4 steps on 3 rows": (
        lambda n: mpp.inner_steps(n, 4),
        ValueError,
        (
            "inner step 3",
            "layer 'norm' (PerStepBatchNorm1d)",
            "legal: 0 to 2",
            "num_steps=4",
            "extra_steps='last'",
        ),
    ),
    "at step -1": (lambda n: forward_at(n, -1), ValueError, ("step", "at least 0", "got -1")),
    "at step 1.0": (lambda n: forward_at(n, 1.0), TypeError, ("step", "got 1.0", "pass an int")),
    "at step 3 of 3": (
        lambda n: forward_at(n, 3),
        ValueError,
        ("inner step 3", "legal: 0 to 2", "fewer steps", "extra_steps='last'"),
    ),
    "two loops": (two_loops, RuntimeError, ("another inner_steps loop", "use a copy")),
}
OUTSIDE: dict[str, Row] = {
    "setup, an optimizer for rates": (
        lambda n: mpp.check_setup(n, torch.optim.SGD(n.parameters(), 0.1)),
        TypeError,
        ("expected the inner rates, an LSLR", "got SGD"),
    ),
    "setup, order for losses": (
        lambda n: mpp.check_setup(n, None, multi_step_loss=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("multi_step_loss must be", "got DerivativeOrderAnnealing", "by its own name"),
    ),
    "setup, losses for order": (
        lambda n: mpp.check_setup(n, None, derivative_order=mpp.MultiStepLoss(3, 10)),
        TypeError,
        ("derivative_order must be", "got MultiStepLoss", "by its own name"),
    ),
    "setup, a run of 0 epochs": (
        lambda n: mpp.check_setup(n, None, run_epochs=0),
        ValueError,
        ("run_epochs", "at least 1", "got 0"),
    ),
    "torch, too old": (
        lambda n: import_with_torch("2.5.1+cpu"),
        ImportError,
        ("needs torch from 2.6 on", "found 2.5.1+cpu", "pip install 'torch>=2.6'"),
    ),
    "torch, without a part of forward mode": (
        forward_mode_without_its_part,
        NotImplementedError,
        ("needs a part that torch", "does not have", "use reverse mode"),
    ),
    "command, a class that takes arguments": (
        lambda n: named.load_model("torch.nn:Linear"),
        TypeError,
        ("torch.nn:Linear takes arguments", "'in_features'", "return Linear(...)"),
    ),
    "command, no colon": (
        lambda n: named.load_model("my_models"),
        ValueError,
        ("'my_models' is not of the form package.module:name",),
    ),
    "command, no such name": (
        lambda n: named.load_model("math:pie"),
        ImportError,
        ("module math has no 'pie'", "it defines"),
    ),
    "command, no model": (
        lambda n: named.load_model("math:pi"),
        TypeError,
        ("math:pi gave a float", "name a torch.nn.Module", "without arguments"),
    ),
    "command, no shape": (
        lambda n: list(described.describe(n, 3, None, named.read_shape("3x4"))),
        ValueError,
        ("--shape", "at least 1", "got '3x4'", "such as 1,28,28"),
    ),
    "command, two outputs": (
        lambda n: list(described.describe(Pair(), 3, None, described.noise_of((3,)))),
        TypeError,
        ("returned a tuple", "leave --shape out", "wrapper"),
    ),
}
TABLE: Table = {**done_to(per_step, STEPS), **done_to(per_step, OUTSIDE)}
test_bad_input = checked(TABLE)


def test_table_is_long_enough() -> None:
    assert len(every_table()) >= 150
