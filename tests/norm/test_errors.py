"""What the norm layers and their conversion refuse."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
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
OTHER_MODELS: Table = {
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
TABLE: Table = {
    **done_to(per_step, COUNTS),
    **done_to(per_step, LAYERS),
    **done_to(per_step, CONVERSIONS, prefix="convert: "),
    **OTHER_MODELS,
}
test_bad_input = checked(TABLE)
