"""What the adapters refuse, and what the other parts do inside of them."""

from __future__ import annotations

import abc
import runpy
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import mamlpp_ext as mpp
from error_tables import Net, Row, Table, checked, done_to, per_step, plain, run, without_norm

higher = pytest.importorskip("higher")
torchopt = pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def inside_higher(net: Net, use: Callable[[Net], Any], **settings: Any) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, diffopt):
        diffopt.step(fnet(torch.randn(4, 3)).sum(), **settings)
        use(fnet)


def inside_torchopt(net: Net, use: Callable[[Net], Any]) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        inner_opt.step(net(torch.randn(4, 3)).sum())
        use(net)


def enter_higher(net: Net, lslr: mpp.LSLR | None = None, **settings: Any) -> None:
    with mpp_higher.innerloop_ctx(net, lslr or mpp.LSLR(per_step(), 3), **settings):
        pass


def enter_torchopt(net: Net, lslr: mpp.LSLR | None = None, **settings: Any) -> None:
    with mpp_torchopt.innerloop_ctx(net, lslr or mpp.LSLR(per_step(), 3), **settings):
        pass


def nested_in_higher(net: Net) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)):
        enter_higher(net)


def steps_in_higher(net: Net, count: int) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, diffopt):
        for _ in range(count):
            diffopt.step(fnet(torch.randn(4, 3)).sum())


def steps_in_torchopt(net: Net, count: int) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        for _ in range(count):
            inner_opt.step(net(torch.randn(4, 3)).sum())


def number_in_torchopt(net: Net) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        inner_opt.step(1.5)


def diffopt_without_params(net: Net) -> None:
    optimizer = mpp_higher.LSLROptimizer(net, mpp.LSLR(net, 3))
    with mpp.frozen_statistics(net):
        loss = net(torch.randn(4, 3)).sum()
    higher.get_diff_optim(optimizer, list(net.parameters())).step(loss)


def chain_of_another_model(net: Net) -> None:
    transform = mpp_torchopt.lslr_transform(mpp.LSLR(per_step(), 3))
    torchopt.MetaOptimizer(net, transform).step(net.head.weight.sum())


def import_without(package: str, adapter: Any) -> None:
    with mock.patch.dict(sys.modules, {package: None}):
        runpy.run_path(adapter.__file__)


def original_in_higher(net: Net) -> None:
    """As one writes by mistake."""
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (_, diffopt):
        diffopt.step(net(torch.randn(4, 3)).sum())


def predicted_before_in_higher(net: Net) -> None:
    with mpp_higher.innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, diffopt):
        prediction = fnet(torch.randn(4, 3))
        for _ in range(2):
            diffopt.step(prediction.square().sum())


def predicted_before_in_torchopt(net: Net) -> None:
    with mpp_torchopt.innerloop_ctx(net, mpp.LSLR(net, 3)) as inner_opt:
        prediction = net(torch.randn(4, 3))
        for _ in range(2):
            inner_opt.step(prediction.square().sum())


def predicted_before_in_a_chain(net: Net) -> None:
    weights = torchopt.extract_state_dict(net, by="reference")
    inner_opt = torchopt.MetaOptimizer(net, mpp_torchopt.lslr_transform(mpp.LSLR(net, 3)))
    prediction = net(torch.randn(4, 3))
    try:
        for _ in range(2):
            inner_opt.step(prediction.square().sum())
    finally:
        torchopt.recover_state_dict(net, weights)


class Caller:
    """An object that holds a layer, and is none."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class CallsByObject(nn.Module):
    """A model whose head nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.last = Caller(self.head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x))


class Counts(nn.Module):
    """A model whose buffer an object counts in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.last = Caller(self.calls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)


class MakesLayer(nn.Module):
    """A model that makes its head when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.head is None:
            self.head = nn.Linear(4, 2)
        return self.head(self.body(x))


class Abstract(nn.Module, abc.ABC):
    """A class that higher's cannot be mixed with."""


class Concrete(Abstract):
    """One of these."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)


def over_two_devices() -> nn.Module:
    net = nn.DataParallel(nn.Linear(3, 4))
    net.device_ids = [0, 1]
    return net


def with_scripted_layer() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 2)))


# As a script has it, whose model is a global.
GLOBAL = nn.Linear(3, 4)
GLOBAL.register_forward_hook(lambda module, args, output: output + GLOBAL.bias)


NOTHING_ADAPTED = ("every gradient of inner step 1 is None", "'body.weight'", "anew in every step")
CONTEXTS: dict[str, Row] = {
    "higher, the model for the patched one": (
        original_in_higher,
        RuntimeError,
        ("'body.weight'", "of the model itself", "call fnet(x), not net(x)"),
    ),
    "higher, predicted before the loop": (
        predicted_before_in_higher,
        RuntimeError,
        NOTHING_ADAPTED,
    ),
    "torchopt, predicted before the loop": (
        predicted_before_in_torchopt,
        RuntimeError,
        NOTHING_ADAPTED,
    ),
    "rates before the model": (
        lambda n: mpp_higher.LSLROptimizer(n.parameters(), mpp.LSLR(n, 3)),
        TypeError,
        ("a torch.nn.Module, got generator", "model first and its LSLR second"),
    ),
    "higher, rates of another model": (
        lambda n: enter_higher(n, mpp.LSLR(without_norm(), 3)),
        ValueError,
        ("this LSLR adapts '0.weight'", "it has 'body.weight'", "build the table from this model"),
    ),
    "torchopt, rates of another model": (
        lambda n: enter_torchopt(n, mpp.LSLR(without_norm(), 3)),
        ValueError,
        ("this LSLR adapts '0.weight'", "it has 'body.weight'", "build the table from this model"),
    ),
    "higher, patched again": (
        lambda n: inside_higher(n, enter_higher),
        ValueError,
        ("'body.weight'", "adapted weights instead of parameters", "pass the original model"),
    ),
    "higher, nested": (
        nested_in_higher,
        RuntimeError,
        ("inside an innerloop_ctx already", "leave one before", "copy.deepcopy of the model"),
    ),
    "higher, inside torchopt": (
        lambda n: inside_torchopt(n, enter_higher),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "torchopt, nested": (
        lambda n: inside_torchopt(n, enter_torchopt),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "torchopt, patched": (
        lambda n: inside_higher(n, enter_torchopt),
        ValueError,
        ("'body.weight'", "or patched", "pass the original model"),
    ),
    "task batch, inside torchopt": (
        lambda n: inside_torchopt(n, lambda net: run(net, lslr=mpp.LSLR(per_step(), 3))),
        ValueError,
        ("'body.weight'", "inside an inner loop already", "end that loop first"),
    ),
    "task batch, patched": (
        lambda n: inside_higher(n, lambda net: run(net, lslr=mpp.LSLR(per_step(), 3))),
        ValueError,
        ("'body.weight'", "or patched", "pass the original model"),
    ),
    "higher, steps": (
        lambda n: steps_in_higher(n, 4),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "torchopt, steps": (
        lambda n: steps_in_torchopt(n, 4),
        ValueError,
        ("inner step 3", "LSLR with num_steps=3", "legal: 0 to 2", "extra_steps='last'"),
    ),
    "higher, a loss without a graph": (
        torch.no_grad()(lambda n: steps_in_higher(n, 1)),
        RuntimeError,
        ("has no graph", "torch.no_grad()", "track_higher_grads=False"),
    ),
    "torchopt, a number for the loss": (
        number_in_torchopt,
        TypeError,
        ("got 1.5 of type float", "not loss.item()"),
    ),
    "torchopt, order by its schedule": (
        lambda n: enter_torchopt(n, second_order=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("second_order must be True or False", "da.second_order"),
    ),
    "higher, order by its schedule": (
        lambda n: enter_higher(n, second_order=mpp.DerivativeOrderAnnealing(5)),
        TypeError,
        ("second_order must be True or False", "da.second_order"),
    ),
    "higher, override of a rate": (
        lambda n: inside_higher(n, lambda net: None, override={"lr": [0.5]}),
        ValueError,
        ("override of ['lr']", "legal is 'second_order'", "lslr.rates"),
    ),
    "higher, no parameters": (
        diffopt_without_params,
        ValueError,
        ("params=None", "no patched model", "pass params"),
    ),
    "torchopt, unknown parameters": (
        lambda n: mpp_torchopt.lslr_transform(mpp.LSLR(n, 3)).init([torch.ones(2)]),
        ValueError,
        ("1 parameters", "'head.bias'", "dict(net.named_parameters())"),
    ),
    "torchopt, another model": (
        chain_of_another_model,
        ValueError,
        ("cannot tell which", "'body.weight'", "from this very model"),
    ),
    "higher is not installed": (
        lambda n: import_without("higher", mpp_higher),
        ImportError,
        ("needs the package higher", "pip install 'mamlpp_ext[higher]'"),
    ),
    "torchopt is not installed": (
        lambda n: import_without("torchopt", mpp_torchopt),
        ImportError,
        ("needs the package torchopt", "pip install 'mamlpp_ext[torchopt]'"),
    ),
}
CONVERSIONS: dict[str, Row] = {
    "patched": (
        lambda n: inside_higher(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "adapted weights instead of parameters", "convert the original model"),
    ),
    "rates of the patched": (
        lambda n: inside_higher(n, lambda net: mpp.LSLR(net, 3)),
        ValueError,
        ("adapted weights instead of parameters", "before the loop"),
    ),
    "inside torchopt": (
        lambda n: inside_torchopt(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "adapted weights instead of parameters", "convert the original model"),
    ),
}
OTHER_MODELS: Table = {
    "torchopt, predicted before the loop, in a chain": (
        without_norm,
        predicted_before_in_a_chain,
        RuntimeError,
        ("every gradient of inner step 1 is None", "'0.weight'", "anew in every step"),
    ),
    "higher, a layer called by an object": (
        CallsByObject,
        lambda n: steps_in_higher(n, 1),
        RuntimeError,
        ("'head.weight', 'head.bias' of the model itself", "mamlpp_ext.integrations.torchopt"),
    ),
    "higher, a buffer that an object holds": (
        Counts,
        lambda n: steps_in_higher(n, 1),
        RuntimeError,
        ("in the attribute 'last' of this Counts", "keep the tensor itself", "torchopt"),
    ),
    "higher, a layer made by the forward": (
        MakesLayer,
        lambda n: steps_in_higher(n, 1),
        RuntimeError,
        ("has made a layer", "call the model once before its rates"),
    ),
    "higher, a class of its own kind": (
        Concrete,
        lambda n: enter_higher(n, mpp.LSLR(n, 3)),
        TypeError,
        ("higher cannot patch this Concrete", "method resolution", "use task_batch_loss"),
    ),
    "higher, a hook that names the model": (
        lambda: GLOBAL,
        lambda n: enter_higher(n, mpp.LSLR(n, 3)),
        ValueError,
        ("as the global 'GLOBAL'", "take the module that they are called with", "torchopt"),
    ),
    "higher, over two devices": (
        over_two_devices,
        lambda n: enter_higher(n, mpp.LSLR(n, 3)),
        TypeError,
        ("DataParallel would copy layers", "pass the model in it, its .module"),
    ),
    "torchopt, a scripted layer": (
        with_scripted_layer,
        lambda n: enter_torchopt(n, mpp.LSLR(n, 3)),
        TypeError,
        ("'1' (RecursiveScriptModule) is scripted", "use task_batch_loss"),
    ),
    "convert a patched model": (
        plain,
        lambda n: inside_higher(n, lambda net: mpp.convert_batchnorm(net, 5)),
        ValueError,
        ("'body'", "patched already", "convert the original model"),
    ),
    "torchopt, tied parameters in a chain": (
        tied,
        lambda n: torchopt.MetaOptimizer(n, mpp_torchopt.lslr_transform(mpp.LSLR(n, 3))).step(
            n(torch.ones(2, 3)).sum()
        ),
        ValueError,
        ("'0.weight'", "several places", "use MetaLSLR"),
    ),
}
TABLE: Table = {
    **done_to(per_step, CONTEXTS),
    **done_to(per_step, CONVERSIONS, prefix="convert: "),
    **OTHER_MODELS,
}
test_bad_input = checked(TABLE)
