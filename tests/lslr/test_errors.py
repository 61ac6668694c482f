"""What the table of rates and its update refuse."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from error_tables import Net, Row, Table, checked, done_to, per_step, plain

pytestmark = pytest.mark.usefixtures("float64")


def frozen() -> nn.Module:
    """A model that nothing can be adapted of."""
    return plain().requires_grad_(False)


def update(
    net: Net, step: Any = 0, without_param: str = "", without_grad: str = "", **other: Tensor
) -> None:
    tensors = dict(net.named_parameters())
    params = {name: p for name, p in tensors.items() if name != without_param}
    grads = {name: p for name, p in tensors.items() if name != without_grad}
    mpp.LSLR(net, 3).update(params, grads | other, step)


def rates_of(names: str, steps: int = 3) -> dict[str, Any]:
    return mpp.LSLR(per_step(), steps, adapt=names).state_dict()


RATES: dict[str, Row] = {
    "lslr 0 steps": (lambda n: mpp.LSLR(n, 0), ValueError, ("num_steps", "at least 1", "got 0")),
    "lslr 1.5 steps": (lambda n: mpp.LSLR(n, 1.5), TypeError, ("num_steps", "got 1.5", "an int")),
    "lslr extra steps None": (
        lambda n: mpp.LSLR(n, 5, extra_steps=None),
        ValueError,
        ("extra_steps", "got None"),
    ),
    "parameters for a model": (
        lambda n: mpp.LSLR(n.parameters(), 5),
        TypeError,
        ("torch.nn.Module", "got generator", "pass the model itself"),
    ),
    "update with a list too long": (
        lambda n: mpp.LSLR(n, 3).update([*n.parameters()], [*n.parameters()], 0),
        ValueError,
        ("params has 6 tensors", "LSLR adapts 4 ('body.weight', ", "in this order"),
    ),
    "update with a generator": (
        lambda n: mpp.LSLR(n, 3).update(dict(n.named_parameters()), n.parameters(), 0),
        TypeError,
        ("grads must be a dict by name, or a list", "got generator", "lslr.parameters_of(model)"),
    ),
    "lr nan": (lambda n: mpp.LSLR(n, 5, lr=math.nan), ValueError, ("lr", "finite", "got nan")),
    "lr inf": (lambda n: mpp.LSLR(n, 5, lr=math.inf), ValueError, ("lr", "finite", "got inf")),
    "lr -0.1": (
        lambda n: mpp.LSLR(n, 5, lr=-0.1),
        ValueError,
        ("lr", "at least 0", "got -0.1", "may turn a rate negative later"),
    ),
    "lr text": (lambda n: mpp.LSLR(n, 5, lr="0.1"), ValueError, ("lr", "got '0.1'")),
    "lr True": (lambda n: mpp.LSLR(n, 5, lr=True), ValueError, ("lr", "got True")),
    "lr for each tensor": (
        lambda n: mpp.LSLR(n, 5, lr=[0.1, 0.2]),
        ValueError,
        ("lr", "finite number", "got [0.1, 0.2]"),
    ),
    "pattern of nothing": (
        lambda n: mpp.LSLR(n, 5, adapt=["head.*", "tail.*"]),
        ValueError,
        ("'tail.*' matches no parameter", "'body.weight'", "'head.bias'"),
    ),
    "callable of nothing": (
        lambda n: mpp.LSLR(n, 5, adapt=lambda name: False),
        ValueError,
        ("nothing is left to adapt in Sequential", "'body.weight'"),
    ),
    "adapt empty": (
        lambda n: mpp.LSLR(n, 5, adapt=[]),
        ValueError,
        ("nothing is left to adapt", "adapt=[]"),
    ),
    "adapt a number": (
        lambda n: mpp.LSLR(n, 5, adapt=5),
        TypeError,
        ("adapt", "callable", "pattern", "got 5"),
    ),
    "adapt numbers": (
        lambda n: mpp.LSLR(n, 5, adapt=[1, 2]),
        TypeError,
        ("adapt", "callable", "pattern", "1"),
    ),
    "only per-step layers": (
        lambda n: mpp.LSLR(n.norm, 5),
        ValueError,
        ("nothing is left to adapt in PerStepBatchNorm1d", "'weight', 'bias'"),
    ),
    "update lacks a parameter": (
        lambda n: update(n, without_param="head.bias"),
        KeyError,
        ("params lacks 'head.bias'", "it has", "by its name in named_parameters()"),
    ),
    "update lacks a gradient": (
        lambda n: update(n, without_grad="body.weight"),
        KeyError,
        ("grads lacks 'body.weight'", "a missing gradient as None"),
    ),
    "update with a gradient that would broadcast": (
        lambda n: update(n, **{"head.bias": torch.zeros(4, 2)}),
        ValueError,
        ("gradient of 'head.bias' has shape (4, 2)", "the parameter (2,)", "this very tensor"),
    ),
    "update at step 3 of 3": (
        lambda n: update(n, step=3),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "update at step -1": (lambda n: update(n, step=-1), ValueError, ("step", "got -1")),
    "update at step 0.5": (lambda n: update(n, step=0.5), TypeError, ("step", "got 0.5")),
    "table of other names": (
        lambda n: mpp.LSLR(n, 3, adapt="head.*").load_state_dict(rates_of("body.*")),
        RuntimeError,
        ("only there 'body.weight'", "only in this LSLR 'head.weight'", "nothing was loaded"),
    ),
    "table of other steps": (
        lambda n: mpp.LSLR(n, 3, adapt="*").load_state_dict(rates_of("*", steps=5)),
        RuntimeError,
        ("num_steps=5", "num_steps=3"),
    ),
}
OTHER_MODELS: Table = {
    "pattern of the frozen": (
        frozen,
        lambda n: mpp.LSLR(n, 5, adapt="*"),
        ValueError,
        ("'*' matches no parameter that requires grad", "there are none"),
    ),
    "everything frozen": (
        frozen,
        lambda n: mpp.LSLR(n, 5),
        ValueError,
        ("nothing is left to adapt", "parameters that require grad: none"),
    ),
}


def graph_of(net: Net) -> tuple[Tensor, ...]:
    return torch.autograd.grad(net(X).sum(), [*net.parameters()], create_graph=True)


class Tied(nn.Sequential):
    """A model with a weight under two names."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 3))
        self[1].weight = self[0].weight


class Checkpointed(nn.Sequential):
    """A model that runs its second layer again in the backward."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self[1], self[0](input), use_reentrant=False)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(nn.Linear(3, 2))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))


def update_by_graph(net: Net) -> None:
    params = dict(net.named_parameters())
    grads = torch.autograd.grad(net(X + 1).sin().sum(), [*params.values()], create_graph=True)
    mpp.LSLR(net, 3).update(params, grads, 0)


def call_without_buffers(net: Net) -> None:
    """As a future torch may have it."""
    other = copy.copy(net)
    del vars(other)["_buffers"]
    mpp.functional_call(other, {}, X)


X = torch.zeros(2, 3, dtype=torch.float64)
CALLS: Table = {
    "a call with another model's weights": (
        per_step,
        lambda n: mpp.functional_call(n, {"heat.weight": X}, X),
        KeyError,
        ("has no 'heat.weight'", "'head.weight'", "named_parameters()"),
    ),
    "a call with a list": (
        per_step,
        lambda n: mpp.functional_call(n, [*n.parameters()], X),
        TypeError,
        ("a dict of weights by name", "got Sequential and list", "named_parameters()"),
    ),
    "a call with one tensor twice": (
        Tied,
        lambda n: mpp.functional_call(n, {"0.weight": X, "1.weight": X}, X),
        ValueError,
        ("'0.weight' and '1.weight' are one tensor", "pass it under one of the names"),
    ),
    "a call that checkpoints": (
        Checkpointed,
        lambda n: mpp.functional_call(n, {}, X),
        RuntimeError,
        ("activation checkpointing", "gradient_checkpointing_disable()", "rematerialize=True"),
    ),
    "a call of a DataParallel": (
        lambda: nn.DataParallel(nn.Linear(3, 2)),
        lambda n: mpp.functional_call(n, dict(n.named_parameters()), X),
        TypeError,
        ("DataParallel copies its own weights", "pass the model in it, its .module"),
    ),
    "a call of a module that holds things elsewhere": (
        plain,
        call_without_buffers,
        NotImplementedError,
        ("Sequential does not hold its buffers as modules do", "install one of those"),
    ),
    "rates of a scripted model": (
        scripted,
        lambda n: mpp.LSLR(n, 3),
        ValueError,
        ("RecursiveScriptModule is scripted", "adapt the model that it was made of"),
    ),
    "rates of a lazy model": (
        lazy,
        lambda n: mpp.LSLR(n, 3),
        ValueError,
        ("'1.weight', '1.bias' of Sequential are lazy", "run one batch through the model"),
    ),
    "an update without a gradient": (
        per_step,
        lambda n: mpp.LSLR(n, 3).update(
            dict(n.named_parameters()), dict.fromkeys(mpp.LSLR(n, 3).names), 2
        ),
        RuntimeError,
        (
            "every gradient of inner step 2 is None",
            "'body.weight'",
            "compute the support loss anew",
            "functional_call(net, params, x)",
        ),
    ),
    "an update with the second derivative of weight_norm": (
        weight_normed,
        update_by_graph,
        RuntimeError,
        ("aten::_weight_norm_interface", "mpp.twice_differentiable(model) around the loop"),
    ),
    "an update with what has no second derivative": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Hardsigmoid()),
        lambda n: mpp.LSLR(n, 3).update(
            dict(n.named_parameters()),
            dict(zip(("0.weight", "0.bias"), graph_of(n), strict=True)),
            0,
        ),
        RuntimeError,
        (
            "no second derivative",
            "hardsigmoid_backward",
            "F.relu6(x + 3) / 6",
            "second_order=False",
        ),
    ),
}
TABLE: Table = {**CALLS, **done_to(per_step, RATES), **OTHER_MODELS}
test_bad_input = checked(TABLE)
