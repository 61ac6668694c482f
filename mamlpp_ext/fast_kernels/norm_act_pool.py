"""Batch norm, activation and max pooling as one function, with a closed-form double backward.

By itself each of them reads and writes the whole feature map, in each derivative anew. But

- batch norm with a positive weight rises with its input, as ReLU does: a window's greatest value is
  where its greatest input is, and the map that is normalised and activated is the pooled one;
- what comes back through the pooling is zero but at these places, so that all sums of it are sums
  over the pooled map, and the rest of a derivative is the input by a factor for each channel;
- a feature map that nobody else sees need not be written.

The notation is that of ``batch_norm``, with p the input's values where the windows have their
greatest, and g what arrives there, before the activation. Derivatives of the double backward are
torch's own, of the same layers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_ext.fast_kernels import norm_act_pool_kernels as kernels
from mamlpp_ext.fast_kernels.batch_norm_kernels import Running
from mamlpp_ext.fast_kernels.layout import channels_last
from mamlpp_ext.fast_kernels.norm_act_pool_kernels import Kept, Layers
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference
from mamlpp_ext.fast_kernels.quick_function import QuickFunction, all_folded
from mamlpp_ext.torch_private import takes_closed_forms


def normalize_activate_pool(
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


def normalize_activate_pool_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, layers: Layers
) -> Tensor:
    """What :func:`normalize_activate_pool` computes, of torch's differentiable operations."""
    return activate_pool(batch_normalize_reference(x, weight, bias, layers.eps)[0], layers)


def activate_pool(x: Tensor, layers: Layers) -> Tensor:
    """Returns ``x``, normalised, behind the activation and the pooling, by torch's own functions.

    Activations rise, so that they may follow the pooling, which leaves less for them.
    """
    if layers.pooling is not None:
        x = F.max_pool2d(x, *layers.pooling)
    if layers.slope is None:
        return x
    return F.leaky_relu(x, layers.slope) if layers.slope else F.relu(x)


class _NormActPool(QuickFunction):
    """Called without transforms or within vmap, whose rule takes it apart."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, layers: Layers, running: Running | None
    ) -> Any:
        kept, var = kernels.forward(x, weight, bias, layers, running)
        ctx.layers = layers
        output, p, *others = kept
        ctx.save_for_backward(x, weight, bias, output, None if p is x else p, *others)
        if running is None:
            count = x.numel() // x.shape[1]
            var = var * (count / (count - 1))
        ctx.mark_non_differentiable(kept.mean, var)
        ctx.set_materialize_grads(False)
        return kept.output, kept.mean, var

    @staticmethod
    def backward(ctx: Any, arrived: Tensor | None, *_: Any) -> Any:
        if arrived is None:
            return None, None, None, None, None
        x, weight, bias, *saved = ctx.saved_tensors
        grads: Any
        if not takes_closed_forms(arrived):
            grads = _torchs_backward(arrived, x, weight, bias, ctx.layers)
        elif torch.is_grad_enabled():
            apply: Any = _NormActPoolBackward.apply
            grads = apply(arrived, x, weight, bias, *saved, ctx.layers)
        else:
            grads = kernels.backward(arrived, x, weight, _kept(x, saved), ctx.layers)
        wanted = (True, weight is not None, bias is not None)
        return *(g if w else None for g, w in zip(grads, wanted, strict=False)), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, *how: Any) -> Any:
        size = info.batch_size
        # Each task normalises by itself anyway.
        many = all_folded((x, weight, bias), in_dims, size, (1, 0, 0))
        apply: Any = _NormActPool.apply
        y, mean, var = apply(channels_last(many[0]), *many[1:], *how)
        unfolded = (t.unflatten(dim, (size, -1)) for t, dim in ((y, 1), (mean, 0), (var, 0)))
        return tuple(unfolded), (1, 0, 0)


def _kept(x: Tensor, saved: Any) -> Kept:
    output, p, *others = saved
    return Kept(output, x if p is None else p, *others)


class _NormActPoolBackward(QuickFunction):
    """The backward of :class:`_NormActPool`."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, x: Tensor, weight: Any, bias: Any, *how: Any) -> Any:
        *saved, ctx.layers = how
        *grads, g = kernels.backward(arrived, x, weight, _kept(x, saved), ctx.layers)
        ctx.save_for_backward(arrived, x, weight, bias, *saved, *grads[1:], g)
        ctx.set_materialize_grads(False)
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        arrived, x, weight, bias, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not takes_closed_forms(*cotangents):
            with torch.enable_grad():
                inputs = arrived, x, weight, bias = _views(arrived, x, weight, bias)
                grads = _torchs_backward(arrived, x, weight, bias, ctx.layers)
                return *_gradients(grads, cotangents, inputs), *[None] * 6
        u, v, s = cotangents
        u = torch.zeros_like(x) if u is None else u
        to_arrived, to_x, to_weight = kernels.double_backward(
            (u, v, s), x, weight, _kept(x, saved[:5]), saved[5:], ctx.layers
        )
        return to_arrived, to_x, None if weight is None else to_weight, *[None] * 7


def _torchs_backward(
    arrived: Tensor, x: Tensor, weight: Any, bias: Any, layers: Layers
) -> list[Tensor | None]:
    """The gradients to x, weight and bias by torch's own operations, in any kind of derivative."""
    with torch.enable_grad():
        x, weight, bias = _views(x, weight, bias)
        output = normalize_activate_pool_reference(x, weight, bias, layers)
        return _gradients([output], [arrived], [x, weight, bias])


def _views(*tensors: Any) -> list[Any]:
    # Or a gradient would also go from one of the inputs to another that it is made of. In the
    # default layout, as vmap over a backward has no rules for others (torch 2.13).
    return [None if t is None else t.contiguous().view_as(t) for t in tensors]


def _gradients(outputs: Any, weights: Any, inputs: Sequence[Any]) -> list[Tensor | None]:
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if not (o is None or w is None)]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [w for _, w in pairs], create_graph=True, allow_unused=True
    )
    found = iter(grads)
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
