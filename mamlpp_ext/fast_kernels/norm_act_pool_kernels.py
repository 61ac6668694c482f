"""What batch norm, activation and pooling as one run: forward, backward and double backward.

The notation is that of ``norm_act_pool``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_ext.fast_kernels.batch_norm_kernels import Running, Sums, centred_sums, factors_to_x
from mamlpp_ext.fast_kernels.layout import channels_last


class Layers(NamedTuple):
    """What follows a convolution.

    Attributes:
        eps: of the batch norm, added to the variance.
        slope: of the activation below zero, at least 0: 0 for ReLU; None for no activation.
        pooling: the arguments of ``F.max_pool2d``, each a pair of ints, and ``ceil_mode``; or None.
    """

    eps: float
    slope: float | None
    pooling: Sequence[Any] | None


class Kept(NamedTuple):
    """What the derivatives need besides the inputs.

    Attributes:
        output: as returned; its sign tells the activation's slope.
        p: the input at the places of the greatest values; the input itself without a pooling.
        places: where these are in the input's memory; None without a pooling.
        mean: [C].
        rstd: 1 / sqrt(var + eps), [C].
    """

    output: Tensor
    p: Tensor
    places: Tensor | None
    mean: Tensor
    rstd: Tensor


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, layers: Layers, running: Running | None
) -> tuple[Kept, Tensor]:
    """Returns what is kept and the biased variance [C]."""
    mean, var = torch.batch_norm_update_stats(x, *(running or (None, None, 0.0)))
    rstd = torch.rsqrt(var + layers.eps)
    scale = rstd if weight is None else weight * rstd
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    p, places = x, None
    if layers.pooling is not None:
        rises = weight is None or bool(weight.min() > 0)
        seen = x if rises else _nchw(torch.addcmul(shift, _nhwc(x), scale))
        p, at = torch.ops.aten.max_pool2d_with_indices(seen, *layers.pooling)
        places = torch.add(_starts(x.shape), _nhwc(at), alpha=x.shape[1]).view(-1)
        p = p if rises else _taken(x, places, p)
    output = torch.addcmul(shift, _nhwc(p), scale)
    if layers.slope is not None:
        output = F.leaky_relu_(output, layers.slope) if layers.slope else output.relu_()
    return Kept(_nchw(output), p, places, mean, rstd), var


@lru_cache(maxsize=64)
def _starts(shape: tuple[int, ...]) -> Tensor:
    """Returns where each image's and channel's values begin in channels_last memory."""
    n, c, h, w = shape
    images = torch.arange(n, device="cpu") * (c * h * w)
    return images.view(n, 1, 1, 1) + torch.arange(c, device="cpu")


def _nhwc(x: Tensor) -> Tensor:
    """Returns ``x``, channels_last, as its memory has it: there [C] broadcasts."""
    return x.movedim(1, 3)


def _nchw(x: Tensor) -> Tensor:
    return x.movedim(3, 1)


def _taken(x: Tensor, places: Tensor | None, like: Tensor) -> Tensor:
    """Returns the values of ``x`` at these places, in the shape of ``like``."""
    if places is None:
        return x
    return _nchw(_nhwc(x).view(-1).index_select(0, places).view(_nhwc(like).shape))


def _added(x: Tensor, places: Tensor | None, g: Tensor, of_g: Tensor) -> Tensor:
    """Adds ``g of_g`` to ``x`` [N, H, W, C] in place, at these places; returns [N, C, H, W]."""
    if places is None:
        return _nchw(x.addcmul_(_nhwc(g), of_g))
    x.view(-1).scatter_add_(0, places, (_nhwc(g) * of_g).view(-1))
    return _nchw(x)


def _before_activation(g: Tensor, output: Tensor, slope: float | None) -> Tensor:
    if slope is None:
        return g
    if slope == 0:
        return torch.ops.aten.threshold_backward(g, output, 0)  # type: ignore[no-any-return]
    return torch.ops.aten.leaky_relu_backward(g, output, slope, True)  # type: ignore[no-any-return]


def backward(
    arrived: Tensor, x: Tensor, weight: Tensor | None, kept: Kept, layers: Layers
) -> tuple[Tensor, ...]:
    """Returns what goes to x, weight and bias, and g."""
    output, p, places, mean, rstd = kept
    g = _before_activation(channels_last(arrived), output, layers.slope)
    g_xhat, g_sum = centred_sums(g, p, mean, rstd)
    of_g = rstd if weight is None else weight * rstd
    share = of_g * (-x.shape[1] / x.numel())
    of_x = (share * rstd).mul_(g_xhat)
    constant = (share * g_sum).addcmul_(of_x, mean, value=-1)
    to_x = torch.addcmul(constant, _nhwc(x), of_x)
    return _added(to_x, places, g, of_g), g_xhat, g_sum, g


def double_backward(
    arrived: tuple[Tensor, Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor | None,
    kept: Kept,
    gradients: Sequence[Tensor],
    layers: Layers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what goes to the gradient that arrived at the output, to x and to the weight."""
    (u, v, s), (g_xhat, g_sum, g) = arrived, gradients
    output, p, places, mean, rstd = kept
    part, u = x.shape[1] / x.numel(), channels_last(u)
    u_at_p = _taken(u, places, p)
    u_xhat, u_sum = centred_sums(u, x, mean, rstd)
    u_g, _ = centred_sums(u_at_p, g, torch.zeros_like(mean), torch.ones_like(mean))
    sums = Sums(g_sum, g_xhat, u_sum, u_xhat, u_g)
    (of_g, of_u, of_x, constant), to_weight = factors_to_x(sums, weight, mean, rstd, v, part)

    # of_g is -part w r^2 sum(u xhat) + v r: what multiplies p in w r P(u) + v xhat, too.
    factor = rstd if weight is None else weight * rstd
    shift = (factor * u_sum).mul_(-part).addcmul_(of_g, mean, value=-1)
    to_g = torch.addcmul(shift if s is None else shift.add_(s), _nhwc(p), of_g)
    to_g = _nchw(to_g.addcmul_(_nhwc(u_at_p), factor))

    to_x = torch.addcmul(constant, _nhwc(x), of_x).addcmul_(_nhwc(u), of_u)
    to_x = _added(to_x, places, g, of_g)
    return _before_activation(to_g, output, layers.slope), to_x, to_weight
