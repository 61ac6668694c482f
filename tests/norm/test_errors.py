"""What the norm layers and their conversion refuse."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from error_tables import Net, Row, Table, checked, done_to, per_step, plain, without_norm

pytestmark = pytest.mark.usefixtures("float64")

norm1d, norm2d, norm3d = mpp.PerStepBatchNorm1d, mpp.PerStepBatchNorm2d, mpp.PerStepBatchNorm3d
x1, x2 = torch.ones(4, 4), torch.ones(2, 4, 3, 3)


def with_layer(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(OrderedDict({"norm": nn.BatchNorm1d(4), "odd": layer()}))


def hooked() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.register_forward_hook(lambda *args: None)
    return layer


def mismatched() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False  # and keeps its buffers
    return layer


def tied_norms() -> nn.Module:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    return net


def within_a_backward(net: Net) -> None:
    """As activation checkpointing does."""
    x = torch.randn(4, 3, requires_grad=True)
    with mpp.frozen_statistics(net):
        checkpoint(copy.deepcopy(net), x, use_reentrant=False).sum().backward()


def vmapped(net: Net) -> None:
    torch.func.vmap(net)(torch.randn(2, 4, 3))


def differentiated(net: Net) -> None:
    torch.func.grad(lambda x: net(x).sum())(torch.randn(4, 3))


def convert_inside_frozen(net: Net) -> None:
    with mpp.frozen_statistics(net):
        mpp.convert_batchnorm(net, 5)


COUNTS: dict[str, Row] = {
    "layer 0 steps": (lambda n: norm2d(4, 0), ValueError, ("num_steps", "at least 1", "got 0")),
    "layer -1 steps": (lambda n: norm1d(4, -1), ValueError, ("num_steps", "at least 1", "got -1")),
    "layer 2.5 steps": (
        lambda n: norm3d(4, 2.5),
        TypeError,
        ("num_steps", "whole number of at least 1", "got 2.5", "pass an int"),
    ),
    "layer True steps": (
        lambda n: norm2d(4, True),
        TypeError,
        ("num_steps", "got True of type bool", "pass an int"),
    ),
    "layer text steps": (lambda n: norm2d(4, "5"), TypeError, ("num_steps", "got '5' of type str")),
    "layer 0 features": (lambda n: norm2d(0, 5), ValueError, ("num_features", "at least 1")),
    "layer None features": (lambda n: norm2d(None, 5), TypeError, ("num_features", "got None")),
    "convert 0 steps": (
        lambda n: mpp.convert_batchnorm(n, 0),
        ValueError,
        ("num_steps", "at least 1", "got 0"),
    ),
    "convert 5.0 steps": (
        lambda n: mpp.convert_batchnorm(n, 5.0),
        TypeError,
        ("num_steps", "got 5.0 of type float", "pass an int"),
    ),
}
LAYERS: dict[str, Row] = {
    "eps -1": (lambda n: norm2d(4, 5, eps=-1.0), ValueError, ("eps", "from 0 to 1", "got -1.0")),
    "eps nan": (lambda n: norm2d(4, 5, eps=math.nan), ValueError, ("eps", "0 to 1", "got nan")),
    "momentum 1.5": (
        lambda n: norm2d(4, 5, momentum=1.5),
        ValueError,
        ("momentum", "from 0 to 1 or None", "got 1.5", "default"),
    ),
    "momentum text": (lambda n: norm2d(4, 5, momentum="0.1"), ValueError, ("momentum", "'0.1'")),
    "extra steps first": (
        lambda n: norm2d(4, 5, extra_steps="first"),
        ValueError,
        ("extra_steps", "'error' or 'last'", "got 'first'", "reuses the last row"),
    ),
    "extra steps True": (
        lambda n: mpp.convert_batchnorm(n, 5, extra_steps=True),
        ValueError,
        ("extra_steps", "got True"),
    ),
    "integers, in eval": (
        lambda n: norm1d(4, 3).eval()(x1.to(torch.uint8)),
        TypeError,
        ("expects floating-point input", "got torch.uint8", ".float()"),
    ),
    "within a backward": (
        within_a_backward,
        RuntimeError,
        ("called within a backward", "activation checkpointing", "rematerialize=True", "at_step"),
    ),
    "1d given 4": (
        lambda n: norm1d(4, 3)(x2),
        ValueError,
        ("[N, C] or [N, C, L]", "got (2, 4, 3, 3)", "reshape it or use the layer"),
    ),
    "2d given 2": (lambda n: norm2d(4, 3)(x1), ValueError, ("[N, C, H, W]", "got (4, 4)")),
    "2d given 3": (lambda n: norm2d(4, 3)(x2[0]), ValueError, ("[N, C, H, W]", "(4, 3, 3)")),
    "3d given 4": (lambda n: norm3d(4, 3)(x2), ValueError, ("[N, C, D, H, W]", "(2, 4, 3, 3)")),
    "wrong channels": (
        lambda n: n.norm(torch.ones(2, 7)),
        ValueError,
        ("expects 4 channels", "got 7", "num_features=7"),
    ),
    "one value per channel": (
        lambda n: n(torch.ones(1, 3)),
        ValueError,
        ("more than 1 value per channel", "(1, 4)", "larger batch", ".eval()"),
    ),
    "under vmap": (
        vmapped,
        RuntimeError,
        ("running statistics in place", "torch.func", "task_batch_loss", "frozen_statistics"),
    ),
    "under torch.func.grad": (
        differentiated,
        RuntimeError,
        ("running statistics in place", "torch.func", "task_batch_loss", "frozen_statistics"),
    ),
}
CONVERSIONS: dict[str, Row] = {
    "not a module": (
        lambda n: mpp.convert_batchnorm(n.parameters(), 5),
        TypeError,
        ("torch.nn.Module", "got generator", "pass the model itself"),
    ),
    "converted already": (
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("no nn.BatchNorm1d, 2d or 3d", "it is converted already", "leave this call out"),
    ),
}


def keeps_activation() -> nn.Module:
    net = plain()
    net.norm.activation = net(torch.randn(4, 3))
    return net


def with_old_weight_norm() -> nn.Module:
    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        nn.utils.weight_norm(net.body)
    net(torch.randn(4, 3))
    return net


OTHER_MODELS: Table = {
    "a model that keeps an activation": (
        keeps_activation,
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'norm.activation' is in the way, of type Tensor", "delete that first", "kept detached"),
    ),
    "a model with the old weight_norm": (
        with_old_weight_norm,
        lambda n: mpp.convert_norm(n, 5),
        ValueError,
        ("'body.weight' is in the way", "take torch.nn.utils.parametrizations.weight_norm"),
    ),
    "convert without BatchNorm": (
        without_norm,
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("Sequential has no nn.BatchNorm1d, 2d or 3d", "(none)", "leave this call out"),
    ),
    "convert SyncBatchNorm": (
        with_layer(lambda: nn.SyncBatchNorm(4)),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (SyncBatchNorm)", "cannot be expressed", "replace it"),
    ),
    "convert a lazy layer": (
        with_layer(nn.LazyBatchNorm1d),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (LazyBatchNorm1d)", "lazy", "run the model once"),
    ),
    "convert flags without buffers": (
        with_layer(mismatched),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (BatchNorm1d)", "track_running_stats=False with running buffers", "agree first"),
    ),
    "convert tied layers": (
        tied_norms,
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'0' (BatchNorm1d)", "shares its weight or bias", "parameters of its own"),
    ),
    "convert inside frozen_statistics": (
        plain,
        convert_inside_frozen,
        ValueError,
        ("'norm'", "inside frozen_statistics", "before that context"),
    ),
    "convert a hooked layer": (
        with_layer(hooked),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'odd' (BatchNorm1d)", "has hooks", "register them on the converted layer"),
    ),
}


class Doubled(nn.BatchNorm1d):
    """A subclass that does something to its input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class OfDicts(nn.BatchNorm1d):
    """A subclass that cannot be tried on noise."""

    def forward(self, input: Any) -> Tensor:
        return super().forward(input["x"])


class OfLists(nn.InstanceNorm1d):
    """A subclass of a norm with running statistics."""


class Named(nn.Linear):
    """A layer that has a name of ours already."""

    num_steps = 7


class Storage(nn.Module):
    """No forward here, and none around."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's plans for torch.jit.script
        return nn.Sequential(torch.jit.script(nn.Linear(3, 2)))


def instance_norm(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True, **settings))


def flag_cleared() -> nn.Module:
    net = instance_norm()
    net[0].track_running_stats = False
    return net


def layered() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def layered_rows() -> nn.Module:
    return mpp.convert_norm(layered(), 3)


def with_adapted_weights() -> nn.Module:
    net = layered()
    del net[0].weight
    net[0].weight = torch.zeros(4, 3)
    net[0]._parameters["weight"] = net[0].__dict__.pop("weight")
    return net


def replicated(net: Net) -> None:
    """As DataParallel does it: tensors that are no parameters."""
    net = copy.deepcopy(net)
    weight = net[1]._parameters.pop("weight")
    vars(net[1])["weight"] = weight.detach()
    net(torch.ones(2, 3))


def rows_for(names: Any, steps: Any = 5, **settings: Any) -> Callable[[Net], Any]:
    return lambda net: mpp.per_step_parameters(net, steps, names, **settings)


def norms_of(net: Net) -> Any:
    return mpp.convert_norm(net, 5)


def beyond(net: Net) -> None:
    net[1].inner_step.index = 3
    try:
        net(torch.ones(2, 3))
    finally:
        net[1].inner_step.index = 0


ANY_LAYER: dict[str, Row] = {
    "rows for a generator": (
        lambda n: mpp.per_step_parameters(n.parameters(), 5, "*"),
        TypeError,
        ("per_step_parameters takes a torch.nn.Module", "got generator", "pass the model itself"),
    ),
    "0 rows": (rows_for("*", 0), ValueError, ("num_steps", "at least 1", "got 0")),
    "extra steps of rows": (
        rows_for("*", extra_steps="first"),
        ValueError,
        ("extra_steps", "'error' or 'last'", "got 'first'"),
    ),
    "rows for a number": (
        rows_for([1]),
        TypeError,
        ("names must be a callable of the name, or fnmatch patterns", "got 1 of type int"),
    ),
    "rows for None": (rows_for(None), TypeError, ("names must be a callable", "got None")),
    "rows for no name": (
        rows_for(["1.*", "body.*"]),
        ValueError,
        ("names pattern 'body.*' matches no parameter that requires grad", "'0.weight'"),
    ),
    "rows for nothing": (
        rows_for(lambda name: False),
        ValueError,
        ("chooses no parameter of Sequential", "have no rows yet: '0.weight'"),
    ),
}
ROWS: dict[str, Row] = {
    "rows twice": (
        rows_for(["1.weight"], 3),
        ValueError,
        ("names pattern '1.weight' matches no parameter", "'0.weight', '0.bias', '2.weight'"),
    ),
    "norms twice": (
        norms_of,
        ValueError,
        ("no norm layer of torch's", "converted already", "per_step_parameters"),
    ),
    "a row too many": (
        beyond,
        ValueError,
        ("inner step 3 is out of range for PerStepLayerNorm", "extra_steps='last'"),
    ),
    "a table taken away": (
        replicated,
        RuntimeError,
        ("['weight'] of PerStepLayerNorm", "before the conversion", "DistributedDataParallel"),
    ),
}
OTHER_ROWS: Table = {
    "norms without norms": (
        without_norm,
        norms_of,
        ValueError,
        ("Sequential has no norm layer of torch's", "(none)", "per_step_parameters"),
    ),
    "norms with adapted weights": (
        with_adapted_weights,
        norms_of,
        ValueError,
        ("'0' (Linear)", "holds adapted weights", "original model before the loop"),
    ),
    "rows beside other rows": (
        lambda: mpp.per_step_parameters(layered(), 3, ["1.weight"]),
        rows_for(["1.bias"], 5),
        ValueError,
        ("'1.bias' of PerStepLayerNorm", "num_steps=3 and extra_steps='error'", "pass the same"),
    ),
    "rows beside an attribute": (
        lambda: nn.Sequential(Named(3, 2)),
        rows_for("*"),
        ValueError,
        ("'0.weight' of Named", "an attribute 'num_steps' of its own", "rename that"),
    ),
    "rows that nobody reads": (
        Storage,
        rows_for("*"),
        ValueError,
        ("'weight' of Storage", "read by no forward", "convert the model whose forward reads it"),
    ),
    "rows in an LSTM": (
        lambda: nn.Sequential(nn.LSTM(3, 2)),
        rows_for("*"),
        ValueError,
        ("'0.weight_ih_l0' of LSTM", "'_flat_weights' of '0'", "nn.LSTMCell"),
    ),
    "rows in a lazy layer": (
        lambda: nn.Sequential(nn.LazyLinear(3)),
        rows_for("*"),
        ValueError,
        ("'0.weight' of LazyLinear", "lazy", "run the model once"),
    ),
    "rows in a scripted layer": (
        scripted,
        rows_for("0.*"),
        ValueError,
        ("is scripted", "convert the model before torch.jit.script"),
    ),
    "rows with sparse gradients": (
        lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)),
        rows_for("*"),
        ValueError,
        ("'0.weight' of Embedding", "sparse gradients", "sparse=False"),
    ),
    "rows without their statistics": (
        plain,
        rows_for("norm.*"),
        ValueError,
        ("'norm.weight' of BatchNorm1d", "running statistics", "convert_norm(model, num_steps)"),
    ),
    "norms of a subclass of InstanceNorm": (
        lambda: nn.Sequential(OfLists(4, track_running_stats=True)),
        norms_of,
        ValueError,
        ("'0' (OfLists)", "subclass of InstanceNorm", "track_running_stats=False"),
    ),
    "norms with a flag without effect": (
        flag_cleared,
        norms_of,
        ValueError,
        ("'0' (InstanceNorm1d)", "track_running_stats=False with running buffers"),
    ),
    "a subclass that does something before": (
        lambda: nn.Sequential(Doubled(4)),
        norms_of,
        ValueError,
        ("'0' (Doubled) cannot be expressed", "its output in train mode would be another"),
    ),
    "a subclass that cannot be tried": (
        lambda: nn.Sequential(OfDicts(4)),
        lambda n: mpp.convert_batchnorm(n, 5),
        ValueError,
        ("'0' (OfDicts)", "cannot be tried on noise (TypeError: ", "the BatchNorm it is made of"),
    ),
    "a subclass without values": (
        lambda: nn.Sequential(Doubled(4, device="meta")),
        norms_of,
        ValueError,
        ("'0' (Doubled)", "it has no values yet (device 'meta')"),
    ),
    "an InstanceNorm given another shape": (
        lambda: norms_of(instance_norm()),
        lambda n: n(torch.ones(2, 5, 3)),
        ValueError,
        ("expects 2 or 3 dimensions", "channels are 4", "got input of shape (2, 5, 3)"),
    ),
    "an InstanceNorm given one value": (
        lambda: norms_of(instance_norm()),
        lambda n: n(torch.ones(2, 4, 1)),
        ValueError,
        ("more than 1 value per channel of an instance", "(2, 4, 1)", ".eval()"),
    ),
}
TABLE: Table = {
    **done_to(per_step, COUNTS),
    **done_to(per_step, LAYERS),
    **done_to(per_step, CONVERSIONS, prefix="convert: "),
    **done_to(layered, ANY_LAYER),
    **done_to(layered_rows, ROWS),
    **OTHER_MODELS,
    **OTHER_ROWS,
}
test_bad_input = checked(TABLE)
