"""Convolution of images with a double backward made of the kernels of training.

torch (2.13, CPU) makes the double backward of small convolutions with kernels as large as the
images. But a convolution is linear in its input and in its weight, so with u, v, s the gradients
that arrive at the gradients of x, w and b

    double backward   to g: conv(u, w) + conv(x, v) + s
                      to x and w: the backward of g at (u, v) in place of (x, w)

which are the quick kernels of training itself.

Under vmap with a weight for each task, torch adds the bias in a pass of its own over fresh memory
(2.13; 12 ms of a first-order iteration's 200); here it goes into the convolution, in any order. On
a GPU torch's double backward under vmap takes the tasks one after the other for a part of it (2.11:
9 ms of kernels instead of 13 for 8 tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_ext.fast_kernels.layout import channels_last, with_default_gradient
from mamlpp_ext.fast_kernels.quick_function import QuickFunction, all_folded
from mamlpp_ext.torch_private import takes_closed_forms, transforms_active


class Geometry(NamedTuple):
    """How the kernel of a convolution lies on the image, and the groups of channels."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def shape_of_output(self, x: Tensor, w: Tensor) -> torch.Size:
        """Returns the shape of the convolution of ``x`` [N, C, H, W] with the kernel ``w``."""
        sides = zip(x.shape[2:], w.shape[2:], *self[:3], strict=True)
        sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return torch.Size((x.shape[0], w.shape[0], *sizes))


def convolve(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry, second_order: bool) -> Tensor:
    """Returns what ``torch.conv2d`` does; images on the CPU are laid out channels_last.

    Args:
        x: [N, C, H, W].
        w: [O, C / groups, kernel height, kernel width], of the same dtype; without transforms its
            gradient arrives in the default layout.
        b: [O] or None, of the same dtype.
        how: the geometry.
        second_order: whether gradients of gradients will be asked for; a matter of speed alone.
    """
    if transforms_active():  # vmap: the rule lays out what it has folded
        return _apply(x, w, b, (how, second_order))
    if second_order:
        return _apply(_laid_out(x), w, b, (how, True))
    return _forward(_laid_out(x), _laid_out(with_default_gradient(w)), b, how)


def has_slow_weight_gradient(x: Tensor, w: Tensor) -> bool:
    """Returns whether the weight's gradient is slow in channels_last.

    oneDNN takes up to twice as long for it there, where its other kernels are quicker, and torch
    reorders the result once more. Copies of both maps in the default layout cost less for many
    channels and values (torch 2.13, two cores; benchmarks/README.md has the times).
    """
    many = w.shape[1] >= 64 and max(w.numel(), x.numel() // 10) >= 100_000
    return many and x.is_cpu and x.dtype == torch.float32


def _apply(*args: Any) -> Tensor:
    apply: Any = _Convolution.apply
    return apply(*args)  # type: ignore[no-any-return]


def _laid_out(x: Tensor) -> Tensor:
    return channels_last(x) if x.is_cpu and not transforms_active() else x


def _forward(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
    none = [0] * len(how.stride)
    return torch.convolution(x, w, b, *how[:3], False, none, how.groups)


def _backward(
    g: Tensor, x: Tensor, w: Tensor, laid_out: Tensor, how: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Returns what goes to the input, the weight and the bias, each only if it is wanted.

    ``laid_out`` is ``w`` in the layout of ``x``, or ``w`` itself where further derivatives may
    follow.
    """
    to_x, to_w, to_b = wanted
    dx = dw = None
    if to_w and laid_out is not w and has_slow_weight_gradient(x, w):
        dw = _torchs_backward(g.contiguous(), x.contiguous(), w, how, (False, True))[1]
        to_w = False
    if to_x or to_w:
        dx, found = _torchs_backward(g, x, laid_out, how, (to_x, to_w))
        dw = found.contiguous() if to_w else dw
    # Beside the others it takes up to half of their time (torch 2.13), by itself a third of that.
    return dx, dw, g.sum([0, 2, 3]) if to_b else None


def _torchs_backward(
    g: Tensor, x: Tensor, w: Tensor, how: Geometry, wanted: tuple[bool, bool]
) -> tuple[Any, Any]:
    none = [0] * len(how.stride)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        g, x, w, None, *how[:3], False, none, how.groups, (*wanted, False)
    )[:2]


class _Convolution(QuickFunction):
    """Called without transforms or within vmap, whose rule takes it apart; torch's otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Tensor:
        ctx.how, _ = how
        laid_out = _laid_out(w)  # once, where every derivative would do it anew
        ctx.save_for_backward(x, w, laid_out)
        ctx.set_materialize_grads(False)
        return _forward(x, laid_out, b, ctx.how)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        x, w, laid_out = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not takes_closed_forms(g):
            return *_backward(g, x, w, w, ctx.how, wanted), None
        if not torch.is_grad_enabled():
            return *_backward(g, x, w, laid_out, ctx.how, wanted), None
        apply: Any = _ConvolutionBackward.apply
        return *apply(g, x, w, laid_out, ctx.how, wanted), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Any:
        size, (geometry, second_order) = info.batch_size, how
        place = 1
        if in_dims[1] is None and in_dims[2] is None:  # one weight for all: more images
            many, weights, biases, place = x.movedim(in_dims[0], 0).flatten(0, 1), w, b, 0
        else:
            many, weights, biases = all_folded((x, w, b), in_dims, size, (1, 0, 0))
            geometry = geometry._replace(groups=geometry.groups * size)
        if second_order or transforms_active():
            # Within vmap torch's own has no derivatives for what lies channels_last (2.13).
            y = _apply(_laid_out(many), weights, biases, (geometry, second_order))
        else:
            y = _forward(_laid_out(many), _laid_out(weights), biases, geometry)
        return torch.unflatten(y, place, (size, -1)), place


class _ConvolutionBackward(QuickFunction):
    """The backward of :class:`_Convolution`; gradients that are not wanted are None."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, laid_out: Tensor, *how: Any) -> Any:
        ctx.how, wanted = how
        ctx.save_for_backward(g, x, w, laid_out)
        ctx.set_materialize_grads(False)
        return _backward(g, x, w, laid_out, ctx.how, wanted)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        # Made of torch's differentiable operations, so that it has further derivatives.
        g, x, w, laid_out = ctx.saved_tensors
        closed = not torch.is_grad_enabled() and takes_closed_forms(u, v, s)
        laid_out = laid_out if closed else w
        laid_out_v: Any = _laid_out(v) if closed and v is not None else v
        to_g, to_x, to_w = ctx.needs_input_grad[:3]
        parts = []
        if to_g and u is not None:
            parts.append(_forward(u, laid_out, s, ctx.how))
        if to_g and v is not None:
            parts.append(_forward(x, laid_out_v, None if parts else s, ctx.how))
        if to_g and s is not None and not parts:
            parts.append(s.view(-1, 1, 1).expand_as(g))
        along_g = parts[0] if len(parts) == 1 else torch.add(*parts) if parts else None
        wanted = (to_x and v is not None, to_w and u is not None, False)
        along_x = along_w = None
        if any(wanted):
            if v is None:  # the kernel is not read
                v, laid_out_v = w, laid_out
            at = x if u is None else u, v, laid_out_v
            along_x, along_w, _ = _backward(g, *at, ctx.how, wanted)
        return along_g, along_x, along_w, None, None, None
