"""A convolution and the norm, activation and pooling behind it, computed as one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import (
    Geometry,
    Layers,
    Running,
    activate_pool,
    convolve,
    has_slow_weight_gradient,
    in_default_layout,
    normalize_activate_pool,
    with_default_gradient,
)
from mamlpp_ext.norm.base import Measured
from mamlpp_ext.torch_private import transforms_active

# Values of a convolution's output from which on a run is quicker than torch's own layers, in each
# order of derivatives, and in first order as one function (two cores; benchmarks/README.md has the
# crossover).
_LEAST_FIRST_ORDER, _LEAST_SECOND_ORDER, _LEAST_AS_ONE = 15_000, 40_000, 400_000


class Features(NamedTuple):
    """What goes from layer to layer.

    Attributes:
        x: a tensor, as a rule.
        laid_out: whether it is a feature map between two runs, in a layout that nobody may see.
        pooled: of such, whether pooling was the last that was computed.
    """

    x: Any
    laid_out: bool = False
    pooled: bool = False

    def shown(self) -> Any:
        """Returns it as torch's own layers would have laid it out."""
        return in_default_layout(self.x, self.pooled) if self.laid_out else self.x


class Run(NamedTuple):
    """A convolution, its norm, and what of its kind follows.

    Attributes:
        conv: ``nn.Conv2d``.
        norm: ``PerStepBatchNorm2d``.
        layers: what follows the convolution.
        length: how many layers all of these are.
    """

    conv: Any
    norm: Any
    layers: Layers
    length: int

    def compute(self, features: Features) -> tuple[Features, int] | None:
        """Returns what the first of these layers return, and how many they are.

        None where the layers have to be called one by one.
        """
        x, weight, bias = features.x, self.conv.weight, self.conv.bias
        if not _are_alike(x, weight, bias) or not _is_default(weight):
            return None
        if not (features.laid_out or _is_default(x)):
            return None
        how = Geometry(self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups)
        if x.is_cuda:  # what follows is torch's there
            y = convolve(x, weight, bias, how, True) if transforms_active() else None
            return None if y is None else (Features(y), 1)
        shape = how.shape_of_output(x, weight)
        if min(shape) < 1:  # torch says what is wrong
            return None
        second_order = not self.norm.inner_step.first_order
        least = _LEAST_SECOND_ORDER if second_order else _LEAST_FIRST_ORDER
        if shape.numel() < least and not transforms_active():
            return None
        plain = not (second_order or self.layers.pooling or transforms_active())
        if plain and has_slow_weight_gradient(x, weight):  # nothing else would make up for it
            return None
        row = self.norm.current_row(shape)
        if not row.by_batch or not _are_alike(x, row.weight, row.bias):
            return None
        if not (features.laid_out or transforms_active()):  # within, nobody can hold a gradient
            x = with_default_gradient(x)

        def measured(running: Running | None) -> Measured:
            y = convolve(x, weight, bias, how, second_order)
            return normalize_activate_pool(y, row.weight, row.bias, self.layers, running)

        if second_order or transforms_active() or shape.numel() >= _LEAST_AS_ONE:
            y = self.norm.by_statistics_of(row, x.dtype, measured)
        else:
            y = self.norm.normalized(convolve(x, weight, bias, how, second_order), row)
            y = activate_pool(y, self.layers)
        pooled = self.layers.pooling is not None
        return Features(y, laid_out=True, pooled=pooled), self.length


def _are_alike(x: Any, *others: Tensor | None) -> bool:
    """Returns whether these are plain tensors of one kind that there are kernels for."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device
        for t in others
        if t is not None
    )


def _is_default(x: Tensor) -> bool:
    """Returns whether each of the images ``x`` [N, C, H, W] lies in torch's default layout."""
    return x.dim() == 4 and x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1)
