"""Batch norm, activation and max pooling as one function, with a closed-form double backward.

By itself each of them reads and writes the whole feature map, in each derivative anew. But

- batch norm with a positive weight rises with its input, as ReLU does: a window's greatest value is
  where its greatest input is, and the map that is normalised and activated is the pooled one;
- what comes back through the pooling is zero but at these places, so that all sums of it are sums
  over the pooled map, and the rest of a derivative is the input by a factor for each channel;
- a feature map that nobody else sees need not be written.

The notation is that of ``batch_norm``, with x the input and p its values where the windows have
their greatest, g what arrives at these before the activation: both as large as the output.
Derivatives of the double backward are torch's, of the same layers one after the other.
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
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference
from mamlpp_ext.fast_kernels.quick_function import QuickFunction, all_folded
from mamlpp_ext.torch_private import forward_mode_active, transforms_active


class Pooling(NamedTuple):
    """The settings of a max pooling of images, as ``torch.nn.MaxPool2d`` takes them."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @property
    def overlaps(self) -> bool:
        """Whether a value may be the greatest of several windows."""
        reach = zip(self.kernel_size, self.dilation, strict=True)
        sizes = (dilation * (kernel - 1) + 1 for kernel, dilation in reach)
        return any(size > stride for size, stride in zip(sizes, self.stride, strict=True))


class Layers(NamedTuple):
    """What follows a convolution.

    Attributes:
        eps: of the batch norm, added to the variance.
        slope: of the activation below zero, at least 0: 0 for ReLU; None for no activation.
        pooling: None for none.
    """

    eps: float
    slope: float | None
    pooling: Pooling | None


def norm_act_pool(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, layers: Layers, running: Running | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the batch's own statistics, activates and pools.

    Args:
        x: [N, C, H, W] on the CPU, channels_last.
        weight: [C] or None.
        bias: [C] or None.
        layers: the settings.
        running: takes the statistics in; None, as within vmap, for none.

    Returns:
        The output [N, C, H', W'] in channels_last, and where ``running`` is None the batch mean [C]
        and the unbiased batch variance [C]; gradients flow through the output alone.
    """
    apply: Any = _NormActPool.apply
    return apply(x, weight, bias, layers, running)  # type: ignore[no-any-return]


def norm_act_pool_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, layers: Layers
) -> Tensor:
    """What :func:`norm_act_pool` computes, composed of torch's differentiable operations."""
    return in_turn(batch_normalize_reference(x, weight, bias, layers.eps)[0], layers, True)


def in_turn(x: Tensor, layers: Layers, second_order: bool) -> Tensor:
    """Returns ``x``, normalised, behind the activation and the pooling, by torch's own functions.

    Activations rise, so that they may follow the pooling, which leaves less for them and for their
    backward. torch's second derivative of pooling takes longer then (2.13).
    """
    if layers.pooling is None:
        return _activated(x, layers.slope)
    if second_order:
        return F.max_pool2d(_activated(x, layers.slope), *layers.pooling)
    return _activated(F.max_pool2d(x, *layers.pooling), layers.slope)


def _activated(x: Tensor, slope: float | None) -> Tensor:
    return x if slope is None else F.leaky_relu(x, slope) if slope else F.relu(x)


class _Kept(NamedTuple):
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


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, layers: Layers, running: Running | None
) -> tuple[_Kept, Tensor]:
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
        if not rises:
            p = _taken(x, places, p)
    output = torch.addcmul(shift, _nhwc(p), scale)
    if layers.slope is not None:
        output = F.leaky_relu_(output, layers.slope) if layers.slope else output.relu_()
    return _Kept(_nchw(output), p, places, mean, rstd), var


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


def _taken(x: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Returns the values of ``x`` at these places, in the shape of ``like``."""
    return _nchw(_nhwc(x).view(-1).index_select(0, places).view(_nhwc(like).shape))


def _before_activation(g: Tensor, kept: _Kept, slope: float | None) -> Tensor:
    if slope is None:
        return g
    if slope == 0:
        return torch.ops.aten.threshold_backward(g, kept.output, 0)  # type: ignore[no-any-return]
    return torch.ops.aten.leaky_relu_backward(g, kept.output, slope, True)  # type: ignore[no-any-return]


def _sum_of(x: Any, kept: _Kept, g: Tensor, of_g: Tensor, layers: Layers) -> Tensor:
    """Returns what goes to x: what ``x`` returns of a map or the pooled one, and ``g of_g``.

    Args:
        x: whether of the pooled map, to a new tensor [N, H, W, C].
        kept: says where the pooled map's values belong.
        g: [N, C, H', W'].
        of_g: [C].
        layers: the settings.
    """
    if kept.places is None or layers.pooling is None:
        return _nchw(x(False).addcmul_(_nhwc(g), of_g))
    everywhere = x(False)
    if layers.pooling.overlaps:  # a place may take several
        everywhere.view(-1).scatter_add_(0, kept.places, (_nhwc(g) * of_g).view(-1))
    else:
        there = x(True).addcmul_(_nhwc(g), of_g)
        everywhere.view(-1).scatter_(0, kept.places, there.view(-1))
    return _nchw(everywhere)


class _Gradients(NamedTuple):
    """What a backward computes: to x, weight and bias, and g."""

    to_x: Tensor
    to_weight: Tensor
    to_bias: Tensor
    g: Tensor


def _backward(
    arrived: Tensor, x: Tensor, weight: Tensor | None, kept: _Kept, layers: Layers
) -> _Gradients:
    mean, rstd = kept.mean, kept.rstd
    g = _before_activation(channels_last(arrived), kept, layers.slope)
    g_xhat, g_sum = centred_sums(g, kept.p, mean, rstd)
    factor = rstd if weight is None else weight * rstd
    share = factor * (-x.shape[1] / x.numel())
    of_x = (share * rstd).mul_(g_xhat)
    constant = (share * g_sum).addcmul_(of_x, mean, value=-1)

    def by_x(pooled: bool) -> Tensor:
        return torch.addcmul(constant, _nhwc(kept.p if pooled else x), of_x)

    return _Gradients(_sum_of(by_x, kept, g, factor, layers), g_xhat, g_sum, g)


def _double_backward(
    arrived: tuple[Tensor, Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor | None,
    kept: _Kept,
    gradients: _Gradients,
    layers: Layers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what goes to the gradient that arrived at the output, to x and to the weight."""
    u, v, s = arrived
    _, g_xhat, g_sum, g = gradients
    p, mean, rstd, part = kept.p, kept.mean, kept.rstd, x.shape[1] / x.numel()
    u = channels_last(u)
    u_at_p = u if kept.places is None else _taken(u, kept.places, p)
    u_xhat, u_sum = centred_sums(u, x, mean, rstd)
    u_g, _ = centred_sums(u_at_p, g, torch.zeros_like(mean), torch.ones_like(mean))
    sums = Sums(g_sum, g_xhat, u_sum, u_xhat, u_g)
    (of_g, of_u, of_x, constant), to_weight = factors_to_x(sums, weight, mean, rstd, v, part)

    # of_g is -part w r^2 sum(u xhat) + v r: what multiplies p in w r P(u) + v xhat, too.
    factor = rstd if weight is None else weight * rstd
    shift = (factor * u_sum).mul_(-part).addcmul_(of_g, mean, value=-1)
    to_g = torch.addcmul(shift if s is None else shift.add_(s), _nhwc(p), of_g)
    to_g = _nchw(to_g.addcmul_(_nhwc(u_at_p), factor))

    def by_x(pooled: bool) -> Tensor:
        values = torch.addcmul(constant, _nhwc(p if pooled else x), of_x)
        return values.addcmul_(_nhwc(u_at_p if pooled else u), of_u)

    to_x = _sum_of(by_x, kept, g, of_g, layers)
    return _before_activation(to_g, kept, layers.slope), to_x, to_weight


class _NormActPool(QuickFunction):
    """Called without transforms or within vmap, whose rule takes it apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, layers: Layers, running: Running | None
    ) -> Any:
        kept, var = _forward(x, weight, bias, layers, running)
        ctx.layers = layers
        # None for what is x itself: saved once more it would be another tensor.
        output, p, *others = kept
        ctx.save_for_backward(x, weight, bias, output, None if p is x else p, *others)
        ctx.mark_non_differentiable(kept.mean, var)
        ctx.set_materialize_grads(False)
        count = x.numel() // x.shape[1]
        return kept.output, kept.mean, var * (count / (count - 1)) if running is None else var

    @staticmethod
    def backward(ctx: Any, arrived: Tensor | None, *_: Any) -> Any:
        if arrived is None:
            return None, None, None, None, None
        x, weight, bias, *saved = ctx.saved_tensors
        grads: Any
        if transforms_active() or forward_mode_active():
            grads = _torchs_gradients(arrived, x, weight, bias, ctx.layers)
        elif torch.is_grad_enabled():
            apply: Any = _NormActPoolBackward.apply
            grads = apply(arrived, x, weight, bias, *saved, ctx.layers)
        else:
            grads = _backward(arrived, x, weight, _kept(x, saved), ctx.layers)[:3]
        to_x, to_weight, to_bias = grads
        return to_x, None if weight is None else to_weight, None if bias is None else to_bias, *_NO

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, *how: Any) -> Any:
        size = info.batch_size
        # Each task normalises by itself anyway.
        many = all_folded((x, weight, bias), in_dims, size, (1, 0, 0))
        apply: Any = _NormActPool.apply
        y, mean, var = apply(channels_last(many[0]), *many[1:], *how)
        unfolded = (t.unflatten(dim, (size, -1)) for t, dim in ((y, 1), (mean, 0), (var, 0)))
        return tuple(unfolded), (1, 0, 0)


_NO = (None, None)  # gradients of the settings


def _kept(x: Tensor, saved: Any) -> _Kept:
    output, p, *others = saved
    return _Kept(output, x if p is None else p, *others)


def _torchs_gradients(
    arrived: Tensor, x: Tensor, weight: Any, bias: Any, layers: Layers
) -> list[Tensor | None]:
    """The gradients to x, weight and bias by torch's own operations, in any kind of derivative."""
    with torch.enable_grad():
        # Views, or a gradient would also go from one of them to another that it is made of.
        x, weight, bias = _views(x, weight, bias)
        output = norm_act_pool_reference(x, weight, bias, layers)
        return _gradients([output], [arrived], [x, weight, bias])


def _torchs_double_backward(
    cotangents: Any, arrived: Tensor, x: Tensor, weight: Any, bias: Any, layers: Layers
) -> list[Tensor | None]:
    """What goes to arrived, x, weight and bias by torch's own operations."""
    with torch.enable_grad():
        inputs = arrived, x, weight, bias = _views(arrived, x, weight, bias)
        gradients = _torchs_gradients(arrived, x, weight, bias, layers)
        pairs = zip(gradients, cotangents, strict=True)
        there = [(g, c) for g, c in pairs if not (g is None or c is None)]
        return _gradients([g for g, _ in there], [c for _, c in there], inputs)


def _views(*tensors: Any) -> list[Any]:
    return [None if t is None else t.view_as(t) for t in tensors]


def _gradients(outputs: Any, weights: Any, inputs: Sequence[Any]) -> list[Tensor | None]:
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True)
    by_input = dict(zip(map(id, wanted), found, strict=True))
    return [by_input.get(id(t)) for t in inputs]


class _NormActPoolBackward(QuickFunction):
    """The backward of :class:`_NormActPool`."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, x: Tensor, weight: Any, bias: Any, *how: Any) -> Any:
        *saved, ctx.layers = how
        gradients = _backward(arrived, x, weight, _kept(x, saved), ctx.layers)
        ctx.save_for_backward(arrived, x, weight, bias, *saved, *gradients[1:])
        ctx.set_materialize_grads(False)
        return gradients[:3]

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        arrived, x, weight, bias, *others = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms_active() or forward_mode_active():
            found = _torchs_double_backward((u, v, s), arrived, x, weight, bias, ctx.layers)
            return *found, *[None] * 6
        u = torch.zeros_like(x) if u is None else u
        kept, gradients = _kept(x, others[:5]), _Gradients(x, *others[5:])  # x: not read
        to_arrived, to_x, to_weight = _double_backward(
            (u, v, s), x, weight, kept, gradients, ctx.layers
        )
        return to_arrived, to_x, None if weight is None else to_weight, *[None] * 7
