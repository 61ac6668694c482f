"""What several test files need."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import mamlpp_ext as mpp
from mamlpp_ext.fast_kernels import batch_norm
from mamlpp_ext.lslr import update
from mamlpp_ext.norm import run

ROWS = 3
THRESHOLDS = [
    (module, name, getattr(module, name))
    for module, name in (
        (batch_norm, "SMALL"),
        (run, "_LEAST_FIRST_ORDER"),
        (run, "_LEAST_SECOND_ORDER"),
        (run, "_LEAST_AS_ONE"),
        (update, "_SMALL"),
    )
]

# The tensors are tiny: more threads only wait for each other, for minutes on a busy machine.
torch.set_num_threads(1)


# Of the property tests: quick by default, the same examples every time; deep with make test-deep.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=15, derandomize=True, **slow)
settings.register_profile(
    "deep", max_examples=int(os.environ.get("EXAMPLES", "1000")), print_blob=True, **slow
)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are tiny: what is for large ones is tried on them all the same."""
    monkeypatch.setattr(batch_norm, "SMALL", 0)
    monkeypatch.setattr(update, "_SMALL", 0)
    for name in ("_LEAST_FIRST_ORDER", "_LEAST_SECOND_ORDER", "_LEAST_AS_ONE"):
        monkeypatch.setattr(run, name, 0)


@pytest.fixture
def by_size(closed_forms: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors are left to torch, as they are to a user."""
    for module, name, value in THRESHOLDS:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def float64() -> Iterator[None]:
    """A fixed seed and float64 as the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def net(float64: None) -> nn.Module:
    """Names ``body``, ``norm`` and ``head``; 3 features, 2 classes, other numbers in every row."""
    norm = mpp.PerStepBatchNorm1d(4, ROWS)
    layers = {"body": nn.Linear(3, 4), "norm": norm, "relu": nn.ReLU(), "head": nn.Linear(4, 2)}
    for table in (norm.weight.data, norm.running_var):
        table.uniform_(0.5, 1.5)
    for table in (norm.bias.data, norm.running_mean):
        table.normal_()
    return nn.Sequential(OrderedDict(layers))


@pytest.fixture
def lslr(net: nn.Module) -> mpp.LSLR:
    """Rates for ``net``, another one for every tensor and step."""
    table = mpp.LSLR(net, ROWS)
    table.rates.data.uniform_(0.05, 0.5)
    return table


@pytest.fixture
def tasks(float64: None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four tasks of 5 support and 6 target examples."""
    labels = torch.randint(2, (4, 5)), torch.randint(2, (4, 6))
    return torch.randn(4, 5, 3), labels[0], torch.randn(4, 6, 3), labels[1]


@pytest.fixture
def task(tasks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first of ``tasks``."""
    return tuple(part[0] for part in tasks)


@pytest.fixture
def unchanged() -> Any:
    """``with unchanged(module): ...`` holds if structure, tensors, modes and steps are the same."""
    return _unchanged


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    about, values = _everything_about(module)
    yield
    about_now, values_now = _everything_about(module)
    assert about_now == about
    torch.testing.assert_close(values_now, values, rtol=0, atol=0)


def _everything_about(module: nn.Module) -> tuple[list[Any], dict[str, Tensor]]:
    """Returns what can be compared by ``==``, and the values of the tensors."""
    layers, params = list(module.modules()), dict(module.named_parameters())
    steps = [s for s in (getattr(layer, "inner_step", None) for layer in layers) if s is not None]
    about = [
        repr(module),
        [type(layer) for layer in layers],
        [(layer.training, getattr(layer, "track_running_stats", None)) for layer in layers],
        [(id(p), p.requires_grad, p.grad is None) for p in params.values()],
        [(step.index, step.frozen, step.collected is None) for step in steps],
    ]
    tensors = {**params, **dict(module.named_buffers())}
    return about, {n: t.detach().clone() for n, t in tensors.items() if not is_lazy(t)}


def nodes(loss: Tensor) -> int:
    """Returns the size of the graph that ``loss`` keeps alive."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return len(seen)
