"""Batch normalisation as a function, with a closed-form double backward.

``F.batch_norm`` is left aside for measured reasons (torch 2.13): its double backward is made of
some forty temporaries, a quarter of a second-order MAML iteration on CPU; its forward there takes
four times as long as the sums below; and inside ``vmap(grad(...))`` its meta-gradients are silently
wrong when weight and bias are adapted for each task.

Notation, for each channel with N values: mu and r = 1/sqrt(var + eps) of the batch,
xhat = (x - mu) r, and P(g) = g - mean(g) - xhat mean(g xhat), which is symmetric. Then

    forward           y = w xhat + b
    backward          dx = w r P(g)         dw = sum(g xhat)        db = sum(g)

and since d xhat = r P(dx) and dr = -r^2 mean(xhat dx), with u, v, s the gradients that arrive at
dx, dw, db:

    double backward   to g: w r P(u) + v xhat + s
                      to w: <u, dx> / w = r (sum(u g) - sum(u) mean(g) - sum(u xhat) mean(g xhat))
                      to x: r P(q) - <u, dx> r/N xhat,
                            q = v g - w r (mean(g xhat) u + mean(u xhat) g)

Each r P(.) is one ``native_batch_norm_backward``, which also returns the sums. Where derivatives
of the double backward may follow, it is composed of differentiable operations instead.
``normalization.batch_normalize_reference`` composes the forward of such; the tests hold the two
together.

In forward mode, with u, v, s the tangents of x, w, b, the same formulas serve once more: y moves
by w r P(u) + v xhat + s, and since second derivatives are symmetric, dx and dw move by what the
double backward has for x and w, besides the backward of g's own tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.fast_kernels.batch_norm_kernels import (
    SMALL,
    WORTH_A_FUNCTION,
    Running,
    double_backward,
    double_backward_reference,
    forward,
    slow_in_torch,
    sums_and_backward,
)
from mamlpp_ext.fast_kernels.quick_function import QuickFunction, all_folded, primals, save
from mamlpp_ext.torch_private import forward_mode_active


def batch_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises each channel by the batch's own statistics.

    Args:
        x: [N, C, ...].
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.

    Returns:
        The output as ``x``, the batch mean [C] and the unbiased batch variance [C]; gradients flow
        through the output alone.
    """
    apply: Any = _BatchNorm.apply
    y, mean, _, var = apply(x, weight, bias, eps, None)
    return y, mean, var


def batch_normalize_into(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running,
    first_order: bool,
) -> Tensor:
    """The same at less cost, outside of torch.func transforms, which cannot write in place.

    Args:
        x: [N, C, ...].
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.
        running: what takes the batch's statistics in.
        first_order: whether nobody will ask for a second derivative: torch's own forward and
            backward then serve where they are quick. Asked for all the same, it is merely slow.

    Returns:
        The output as ``x``.
    """
    small = x.numel() < SMALL
    if small or (first_order and not slow_in_torch(x, WORTH_A_FUNCTION)):
        # Plain .data: torch would guard running statistics against later updates for the sake of a
        # backward that does not read them in training.
        mean, var, momentum = running.mean.data, running.var.data, running.momentum
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, cudnn)
    apply: Any = _BatchNorm.apply
    return apply(x, weight, bias, eps, running)[0]  # type: ignore[no-any-return]


def _unfold(tensor: Tensor | None, size: int, channel: int) -> Tensor | None:
    return None if tensor is None else torch.unflatten(tensor, channel, (size, -1))


def _derived_further() -> bool:
    """Returns whether derivatives of a derivative may be asked for, in reverse or forward mode."""
    return torch.is_grad_enabled() or forward_mode_active()


class _BatchNorm(QuickFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running | None,
    ) -> Any:
        return forward(x, weight, bias, eps, running)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.eps, _ = inputs
        ctx.has_bias = bias is not None
        _, mean, rstd, var = output
        ctx.mark_non_differentiable(mean, rstd, var)
        save(ctx, x, weight, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        # Without further derivatives, the Function's own bookkeeping would be in vain.
        function: Any = _BatchNormBackward.apply if _derived_further() else sums_and_backward
        dx, dw, db = function(g, x, weight, mean, rstd, ctx.eps)
        return dx, None if weight is None else dw, db if ctx.has_bias else None, None, None

    @staticmethod
    def jvp(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None, *_: Any) -> Any:
        parts = []
        with primals(ctx.saved_tensors) as (x, weight, mean, rstd):
            if u is not None:
                apply: Any = _BatchNormBackward.apply
                parts.append(apply(u, x, weight, mean, rstd, ctx.eps)[0])
            if v is not None or s is not None:
                # The output is linear in weight and bias: their tangents take their places.
                v = torch.zeros_like(mean) if v is None else v
                parts.append(batch_normalize(x, v, s, ctx.eps)[0])
            return sum(parts), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, eps: float, _: Any) -> Any:
        size = info.batch_size
        # Each task normalises by itself anyway.
        many = all_folded((x, weight, bias), in_dims, size, (1, 0, 0))
        apply: Any = _BatchNorm.apply
        y, *statistics = apply(*many, eps, None)
        # The tasks first, but in memory behind the images, as torch's rule has them.
        y = torch.unflatten(y, 1, (size, -1)).movedim(1, 0)
        return (y, *(_unfold(t, size, 0) for t in statistics)), (0, 0, 0, 0)


class _BatchNormBackward(QuickFunction):
    """The backward of :class:`_BatchNorm`; mean and rstd are functions of x, not further inputs."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Any:
        return sums_and_backward(g, x, weight, mean, rstd, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, weight, mean, rstd, ctx.eps = inputs
        _, dw, db = output
        save(ctx, g, x, weight, mean, rstd, dw, db)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        u = torch.zeros_like(ctx.saved_tensors[0]) if u is None else u
        # A third derivative may follow: keep this one differentiable.
        formula = double_backward_reference if _derived_further() else double_backward
        to_g, to_x, to_w = formula(ctx.saved_tensors, ctx.eps, u, v, s)
        return to_g, to_x, to_w if ctx.needs_input_grad[2] else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, g_moved: Tensor | None, u: Tensor | None, v: Tensor | None, *_: Any) -> Any:
        # Second derivatives are symmetric: those along x and weight are the double backward's.
        with primals(ctx.saved_tensors) as saved:
            x, weight, mean, rstd = saved[1:5]
            u = torch.zeros_like(x) if u is None else u
            along_x = double_backward_reference(saved, ctx.eps, u, v, None)[1:]
            moved = *along_x, torch.zeros_like(mean)
            if g_moved is not None:  # linear in g
                apply: Any = _BatchNormBackward.apply
                along_g = apply(g_moved, x, weight, mean, rstd, ctx.eps)
                return tuple(a + b for a, b in zip(moved, along_g, strict=True))
            return moved

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, eps = inputs
        size = info.batch_size
        many = all_folded(tensors, in_dims, size, (1, 1, 0, 0, 0))
        apply: Any = _BatchNormBackward.apply
        dx, dw, db = apply(*many, eps)
        return (_unfold(dx, size, 1), _unfold(dw, size, 0), _unfold(db, size, 0)), (1, 0, 0)
