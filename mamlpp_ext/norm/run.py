"""A convolution and the norm, activation and pooling behind it, computed as one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import (
    Geometry,
    Layers,
    Pooling,
    Running,
    convolution,
    in_default_layout,
    in_turn,
    norm_act_pool,
    with_default_gradient,
)
from mamlpp_ext.norm.base import Measured
from mamlpp_ext.torch_private import transforms_active

# Values of a convolution's output from which on norm, activation and pooling are quicker as one
# function, in each order of derivatives (two cores; benchmarks/README.md has the crossover).
_LEAST_FIRST_ORDER, _LEAST_SECOND_ORDER = 400_000, 40_000


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
    """A convolution and what of its kind follows.

    Attributes:
        conv: ``nn.Conv2d``.
        norm: ``PerStepBatchNorm2d`` or None.
        slope: of the activation below zero; None for none.
        pooling: None for none.
        length: how many layers these are.
    """

    conv: Any
    norm: Any = None
    slope: float | None = None
    pooling: Pooling | None = None
    length: int = 1

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
        shape = how.shape_of_output(x, weight)
        if min(shape) < 1:  # torch says what is wrong
            return None
        if x.is_cuda:
            if not transforms_active():
                return None
            return Features(convolution(x, weight, bias, how, second_order=True)), 1
        if not transforms_active():  # within, nobody can hold a gradient
            weight = with_default_gradient(weight)
            x = x if features.laid_out else with_default_gradient(x)
        if self.norm is None:
            found: Tensor | None = self._without_norm(x, weight, bias, how)
        else:
            found = self._with_norm(x, weight, bias, how, shape)
        if found is None:
            return None
        return Features(found, laid_out=True, pooled=self.pooling is not None), self.length

    def _without_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry
    ) -> Tensor:
        y = convolution(x, weight, bias, how, second_order=True)
        return in_turn(y, Layers(0.0, self.slope, self.pooling), second_order=True)

    def _with_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry, shape: torch.Size
    ) -> Tensor | None:
        row = self.norm.current_row(shape)
        if not row.by_batch or not _are_alike(x, row.weight, row.bias):
            return None
        second_order = not self.norm.inner_step.first_order
        layers = Layers(self.norm.eps, self.slope, self.pooling)
        least = _LEAST_SECOND_ORDER if second_order else _LEAST_FIRST_ORDER
        if not transforms_active() and shape.numel() < least:
            y = convolution(x, weight, bias, how, second_order)
            return in_turn(self.norm.normalized(y, row), layers, second_order)

        def measured(running: Running | None) -> Measured:
            y = convolution(x, weight, bias, how, second_order)
            return norm_act_pool(y, row.weight, row.bias, layers, running)

        return self.norm.by_statistics_of(row, x.dtype, measured)  # type: ignore[no-any-return]


def _are_alike(x: Any, *others: Tensor | None) -> bool:
    """Returns whether these are plain tensors of one kind that there are kernels for."""
    if x.dtype not in (torch.float32, torch.float64) or x.layout != torch.strided:
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device
        for t in (x, *others)
        if t is not None
    )


def _is_default(x: Tensor) -> bool:
    """Returns whether each of the images ``x`` [N, C, H, W] lies in torch's default layout."""
    return x.dim() == 4 and x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1)
