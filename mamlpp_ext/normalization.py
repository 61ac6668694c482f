"""Batch normalisation as a function, with a closed-form double backward.

``F.batch_norm`` is left aside for measured reasons (torch 2.13): its double backward is made of
some forty temporaries, a quarter of a second-order MAML iteration on CPU; its forward there takes
four times as long as the sums below; and under ``vmap`` its meta-gradients are silently wrong when
weight and bias are adapted for each task.

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

Each r P(.) is one ``native_batch_norm_backward``, which also returns the sums.
:func:`batch_normalize_reference` composes the same of differentiable operations; the tests hold the
two together, and third derivatives are taken through it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

_backward = torch.ops.aten.native_batch_norm_backward


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
        The output as ``x``, the batch mean [C] and the biased batch variance [C]; gradients flow
        through the output alone.
    """
    apply: Any = _BatchNorm.apply
    y, mean, _, var = apply(x, weight, bias, eps)
    return y, mean, var


def batch_normalize_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`batch_normalize` computes, composed of torch's differentiable operations."""
    mean = x.mean(_others(x))
    centred = x - _wide(mean, x)
    var = centred.square().mean(_others(x))
    output = centred * _wide(torch.rsqrt(var + eps), x)
    if weight is not None:
        output = output * _wide(weight, x)
    if bias is not None:
        output = output + _wide(bias, x)
    return output, mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalises each channel by given statistics, each [C]; the result has the dtype of ``x``."""
    # At least float32, as torch's kernels: half precision would lose the product mean * scale.
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (mean, var))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(_wide(shift, x), x, _wide(scale, x)).to(x.dtype)


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _wide(channel: Tensor, like: Tensor) -> Tensor:
    return channel.view(1, -1, *[1] * (like.dim() - 2))


def _fold(tensor: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """Turns a vmapped dimension into more channels: each task normalises by itself anyway."""
    if tensor is None:
        return None
    tensor = (
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    )
    folded = tensor.movedim(0, channel).flatten(channel, channel + 1)
    # One channel expanded to many stays a view of stride 0, and torch's CPU kernels read weights
    # and statistics as if they were contiguous (2.13: silently wrong gradients in channels_last).
    return folded if channel else folded.contiguous()


def _unfold(tensor: Tensor | None, size: int, channel: int) -> Tensor | None:
    return None if tensor is None else torch.unflatten(tensor, channel, (size, -1))


def _sums_and_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w r P(g), sum(g xhat) and sum(g)."""
    every = [True, True, True]
    return _backward(g, x, weight, None, None, mean, rstd, True, eps, every)  # type: ignore[no-any-return]


def _cpu_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward on contiguous input on CPU.

    torch's own kernel adds such input up one element at a time: 300 us for [5, 64, 28, 28] on one
    core, where these passes take 85.
    """
    count, rough = x.numel() / x.shape[1], x.mean(_others(x))
    centred = x - _wide(rough, x)
    spread, total = _centred_sums(centred, centred, torch.zeros_like(rough))
    offset = total / count  # what the rounding of the first mean left over
    var = (spread / count - offset.square()).clamp_min(0)
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else rstd * weight
    shift = -offset * scale if bias is None else bias - offset * scale
    torch.addcmul(_wide(shift, x), centred, _wide(scale, x), out=centred)
    return centred, rough + offset, rstd, var


def _centred_sums(a: Tensor, b: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sum(a (b - mean)) and sum(a) by channel: one vectorised pass, no temporary.

    These are the weight and bias gradients of a batch norm whose scale is 1.
    """
    ones, sums = torch.ones_like(mean), [False, True, True]
    return _backward(a, b, None, None, None, mean, ones, True, 0.0, sums)[1:]  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        if x.is_cpu and x.is_contiguous() and x.dtype in (torch.float32, torch.float64):
            return _cpu_forward(x, weight, bias, eps)
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return y, mean, rstd, (rstd.square().reciprocal() - eps).clamp_min(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.eps = inputs
        ctx.has_bias = bias is not None
        _, mean, rstd, var = output
        ctx.mark_non_differentiable(mean, rstd, var)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return None, None, None, None
        apply: Any = _BatchNormBackward.apply
        dx, dw, db = apply(g, *ctx.saved_tensors, ctx.eps)
        has_weight = ctx.saved_tensors[1] is not None
        return dx, dw if has_weight else None, db if ctx.has_bias else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, eps: float) -> Any:
        size = info.batch_size
        x = _fold(x, in_dims[0], size, 1)  # type: ignore[assignment]
        weight, bias = (
            _fold(t, dim, size, 0) for t, dim in zip((weight, bias), in_dims[1:3], strict=True)
        )
        apply: Any = _BatchNorm.apply
        y, *statistics = apply(x, weight, bias, eps)
        return (_unfold(y, size, 1), *(_unfold(t, size, 0) for t in statistics)), (1, 0, 0, 0)


class _BatchNormBackward(torch.autograd.Function):
    """The backward of :class:`_BatchNorm`; mean and rstd are functions of x, not further inputs."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
    ) -> Any:
        return _sums_and_backward(g, x, weight, mean, rstd, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        g, x, weight, mean, rstd, ctx.eps = inputs
        _, dw, db = output
        ctx.save_for_backward(g, x, weight, mean, rstd, dw, db)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, s: Tensor | None) -> Any:
        u = torch.zeros_like(ctx.saved_tensors[0]) if u is None else u
        # With a graph wanted a third derivative may follow: keep this one differentiable.
        formula = _double_backward_reference if torch.is_grad_enabled() else _double_backward
        return *formula(ctx.saved_tensors, ctx.eps, u, v, s), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, eps = inputs
        size = info.batch_size
        folded = (
            _fold(t, dim, size, channel)
            for t, dim, channel in zip(tensors, in_dims[:5], (1, 1, 0, 0, 0), strict=True)
        )
        apply: Any = _BatchNormBackward.apply
        dx, dw, db = apply(*folded, eps)
        return (_unfold(dx, size, 1), _unfold(dw, size, 0), _unfold(db, size, 0)), (1, 0, 0)


def _double_backward(
    saved: tuple[Any, ...], eps: float, u: Tensor, v: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The double backward in the module docstring, with as few passes over memory as possible."""
    g, x, weight, mean, rstd, dw, db = saved
    count = x.numel() / x.shape[1]
    to_g, u_xhat, u_sum = _sums_and_backward(u, x, weight, mean, rstd, eps)
    u_g, _ = _centred_sums(u, g, torch.zeros_like(mean))
    to_w = rstd * (u_g - (u_sum * db + u_xhat * dw) / count)
    slope = rstd if weight is None else rstd * weight
    share = slope * u_xhat / -count if v is None else v - slope * u_xhat / count
    q = torch.addcmul(g * _wide(share, g), u, _wide(slope * dw / -count, u)).to(x.dtype)
    only_x = [True, False, False]
    to_x = _backward(q, x, None, None, None, mean, rstd, True, eps, only_x)[0]
    drift = slope * rstd * to_w / -count  # of xhat / rstd = x - mean
    to_x.addcmul_(x, _wide(drift, x)).sub_(_wide(drift * mean, x))
    if v is not None:
        to_g.addcmul_(x, _wide(v * rstd, x)).sub_(_wide(v * rstd * mean, x))
    if s is not None:
        to_g.add_(_wide(s, x))
    return to_g, to_x, None if weight is None else to_w


def _double_backward_reference(
    saved: tuple[Any, ...], eps: float, u: Tensor, v: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    g, x, weight, *_ = saved

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_normalize_reference(x, weight, bias, eps)[0]

    def backward(g: Tensor, x: Tensor, weight: Tensor) -> Any:
        return vjp(forward, x, weight, torch.zeros_like(weight))[1](g)

    scale = g.new_ones(g.shape[1]) if weight is None else weight
    arrived = (u, *(torch.zeros_like(scale) if t is None else t for t in (v, s)))
    to_g, to_x, to_w = vjp(backward, g, x, scale)[1](arrived)
    return to_g, to_x, None if weight is None else to_w


# torch inspects a Function's forward at every call, which is a third of what a small layer costs; a
# signature that is there already is only looked up.
for _forward in (_BatchNorm.forward, _BatchNormBackward.forward):
    vars(_forward)["__signature__"] = inspect.signature(_forward)
