"""Convolution in channels_last, whose double backward is made of the kernels of training.

torch (2.13, CPU) makes the double backward of small convolutions, with kernels as large as the
images. But a convolution is linear in its input and in its weight, so with u, v, s the gradients
that arrive at the gradients of x, w and b

    double backward   to g: conv(u, w) + conv(x, v) + s
                      to x and w: the backward of g at (u, v) in place of (x, w)

which are the quick kernels of training itself.

Under vmap with a weight for each task, torch adds the bias in a pass of its own over fresh memory
(2.13; 12 ms of a first-order iteration's 200); here it goes into the convolution, in any order.

On a GPU torch's double backward under vmap takes the tasks one after the other for a part of it
(2.11: 9 ms of kernels instead of 13 for 8 tasks); without vmap it is left to torch there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_ext.known_gradients import KnownGradients, Slot
from mamlpp_ext.layout import channels_last
from mamlpp_ext.quick_function import (
    QuickFunction,
    all_folded,
    forward_mode_active,
    is_for_kernels,
    transforms_active,
)

# Values of the output, before strides; below, Python would take longer than is saved.
_WORTH_A_FUNCTION = 50_000


class Geometry(NamedTuple):
    """The settings of a convolution: one number for every spatial dimension, and the groups.

    And whether gradients of its gradients will be asked for, and where these may be known already.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    second_order: bool
    slot: Slot | None = None


def convolution(
    function: Any,
    count: int,
    second_order: bool,
    known: KnownGradients | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Does what ``function`` does, ``torch.conv1d``, ``conv2d`` or ``conv3d`` (``count`` 1 to 3).

    ``second_order`` says whether gradients of gradients will be asked for, and ``known`` what was
    found out when the same was called before: matters of speed alone.

    Whatever the closed form is not for, or not known to pay, is left to ``function`` itself.
    """
    within = transforms_active()
    devices = ("cpu", "cuda") if within else ("cpu",)
    if (
        not (is_for_kernels(input, *devices) and is_for_kernels(weight, *devices))
        or not (bias is None or is_for_kernels(bias, *devices))
        or not input.dim() == weight.dim() == count + 2
        or torch.is_autocast_enabled(input.device.type)
        or forward_mode_active()
    ):
        return function(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    x = input
    if count == 2 and not within:
        x = channels_last(input)
        # Once, where every derivative would copy them anew.
        weight = weight.contiguous(memory_format=torch.channels_last)
    if not (within or (second_order and _is_learned(x, weight, bias) and _worth_it(x, weight))):
        return function(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    how = (stride, padding, dilation)
    if not all(isinstance(value, (int, tuple, list)) for value in how):  # padding="same"
        return function(x, weight, bias, *how, groups)  # type: ignore[no-any-return]
    strides, paddings, dilations = (_each(value, count) for value in how)
    slot = None if known is None else known.next_slot()
    geometry = Geometry(strides, paddings, dilations, groups, second_order, slot)
    apply: Any = _Convolution.apply
    return apply(x, weight, bias, geometry)  # type: ignore[no-any-return]


def _is_learned(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _worth_it(x: Tensor, w: Tensor) -> bool:
    return x.numel() // max(x.shape[1], 1) * w.shape[0] >= _WORTH_A_FUNCTION


def _each(value: Any, count: int) -> tuple[int, ...]:
    sides = (value,) if isinstance(value, int) else tuple(value)
    return sides * count if len(sides) == 1 else sides


def _forward(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
    stride, padding, dilation, groups, *_ = how
    none = [0] * len(stride)
    return torch.convolution(x, w, b, stride, padding, dilation, False, none, groups)


def _quickest(x: Tensor, w: Tensor, how: Geometry) -> Any:
    # torch's own convolution has no derivatives within vmap for what lies channels_last (2.13).
    ours = transforms_active() or how.slot or (how.second_order and _worth_it(x, w))
    return _Convolution.apply if ours else _forward


def _backward(g: Tensor, x: Tensor, w: Tensor, how: Geometry, wanted: Sequence[bool]) -> Any:
    stride, padding, dilation, groups, *_ = how
    none, (to_x, to_w, to_b) = [0] * len(stride), wanted
    dx = dw = None
    if to_x or to_w:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g, x, w, None, stride, padding, dilation, False, none, groups, (to_x, to_w, False)
        )
    # Beside the others it takes up to half of their time (torch 2.13), by itself a third of that.
    db = g.sum([0, *range(2, g.dim())]) if to_b else None
    return dx, dw, db


class _Convolution(QuickFunction):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
        return _forward(x, w, b, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, w, _, ctx.how = inputs
        ctx.save_for_backward(x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None, None, None
        x, w = ctx.saved_tensors
        slot, how, wanted = ctx.how.slot, ctx.how._replace(slot=None), ctx.needs_input_grad[:3]
        # Forward mode has torch's own formula; without further derivatives ours would be in vain.
        further = torch.is_grad_enabled() or transforms_active()
        if further and not forward_mode_active():
            known = slot if slot is not None and slot.is_known(w) else None
            apply: Any = _ConvolutionBackward.apply
            return *apply(g, x, w, how, wanted, known), None
        grads = _backward(g, x, w, how, wanted)
        if slot is not None:
            slot.learn(*grads[1:])
        return *grads, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Any:
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:  # one weight for all: more images
            many = x.movedim(in_dims[0], 0).flatten(0, 1)
            return _quickest(many, w, how)(many, w, b, how).unflatten(0, (size, -1)), 0
        many, weights, biases = all_folded((x, w, b), in_dims, size, (1, 0, 0))
        if many.dim() == 4 and many.is_cpu and not transforms_active():
            many = channels_last(many)
        how = how._replace(groups=how.groups * size)
        y = _quickest(many, weights, how)(many, weights, biases, how)
        return y.unflatten(1, (size, -1)), 1


class _ConvolutionBackward(QuickFunction):
    """The backward of :class:`_Convolution`; gradients that are not wanted are None.

    Those of weight and bias are not computed where they are ``known``.
    """

    @staticmethod
    def forward(
        g: Tensor,
        x: Tensor,
        w: Tensor,
        how: Geometry,
        wanted: Sequence[bool],
        known: Slot | None = None,
    ) -> Any:
        if known is None:
            return _backward(g, x, w, how, wanted)
        dw = known.of_weight if wanted[1] else None
        db = known.of_bias if wanted[2] else None
        missing = wanted[0], wanted[1] and dw is None, wanted[2] and db is None
        dx, new_dw, new_db = _backward(g, x, w, how, missing)
        # Detached, as what is returned becomes a part of the graph.
        return dx, new_dw if dw is None else dw.detach(), new_db if db is None else db.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, w, ctx.how, *_ = inputs
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        # Made of differentiable operations, so that it has further derivatives.
        g, x, w = ctx.saved_tensors
        to_g, to_x, to_w = ctx.needs_input_grad[:3]
        within = transforms_active() and not forward_mode_active()
        forward: Any = _Convolution.apply if within else _forward
        backward: Any = _ConvolutionBackward.apply if within else _backward
        parts = []
        if to_g and u is not None:
            parts.append(forward(u, w, s, ctx.how))
        if to_g and v is not None:
            parts.append(forward(x, v, None if parts else s, ctx.how))
        if to_g and s is not None and not parts:
            parts.append(s.view(-1, *[1] * (g.dim() - 2)).expand_as(g))
        along_g = parts[0] if len(parts) == 1 else torch.add(*parts) if parts else None
        wanted = (to_x and v is not None, to_w and u is not None, False)
        along_x = along_w = None
        if any(wanted):
            at = x if u is None else u, w if v is None else v  # what is None is not read
            along_x, along_w, _ = backward(g, *at, ctx.how, wanted)
        return along_g, along_x, along_w, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        g, x, w, how, wanted, *known = inputs
        size = info.batch_size
        apply: Any = _ConvolutionBackward.apply
        grads = apply(
            *all_folded((g, x, w), in_dims, size, (1, 1, 0)),
            how._replace(groups=how.groups * size),
            wanted,
            *known,
        )
        unfolded = [
            (None, None) if t is None else (t.unflatten(dim, (size, -1)), dim)
            for t, dim in zip(grads, (1, 0, 0), strict=True)
        ]
        return tuple(zip(*unfolded, strict=True))
