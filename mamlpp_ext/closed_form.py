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

Each r P(.) is one ``native_batch_norm_backward``, which also returns the sums.
``normalization.batch_normalize_reference`` composes the same of differentiable operations; the
tests hold the two together, and third derivatives are taken through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from mamlpp_ext.normalization import batch_normalize_reference, wide
from mamlpp_ext.quick_function import QuickFunction

_backward = torch.ops.aten.native_batch_norm_backward.default
# Output, mean, 1 / sqrt(var + eps), unbiased var.
_Forward = tuple[Tensor, Tensor, Tensor, Tensor]
# Elements from which on several fast passes beat torch's single slow one with one thread: in a
# Function, and together with a Function's own cost. More threads help torch's pass more.
_LARGE, _WORTH_A_FUNCTION = 50_000, 75_000


class Running(NamedTuple):
    """Running statistics to take a batch's own into, in place.

    Attributes:
        mean: [C].
        var: unbiased, [C].
        momentum: the batch's share; with 1 they become the batch's own.
    """

    mean: Tensor
    var: Tensor
    momentum: float

    @classmethod
    def of_batch(cls, x: Tensor, like: Tensor) -> Running:
        """Returns ones that become the statistics of ``x`` alone, of the dtype of ``like``."""
        mean, var = like.new_zeros(2, x.shape[1])
        return cls(mean, var, 1.0)


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
    if first_order and not _slow_in_torch(x, _WORTH_A_FUNCTION):
        # Plain .data: torch would guard running statistics against later updates for the sake of a
        # backward that does not read them in training.
        mean, var, momentum = running.mean.data, running.var.data, running.momentum
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, cudnn)
    apply: Any = _BatchNorm.apply
    return apply(x, weight, bias, eps, running)[0]  # type: ignore[no-any-return]


def _fold(tensor: Tensor | None, dim: int | None, size: int, channel: int) -> Tensor | None:
    """Turns a vmapped dimension into more channels: each task normalises by itself anyway."""
    if tensor is None:
        return None
    tensor = (
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    )
    folded = tensor.movedim(0, channel).flatten(channel, channel + 1)
    # One channel expanded to many stays a view of stride 0, and torch's CPU kernels read weights
    # and statistics as if they were contiguous (2.13: wrong gradients in channels_last, no error).
    return folded if channel else folded.contiguous()


def _unfold(tensor: Tensor | None, size: int, channel: int) -> Tensor | None:
    return None if tensor is None else torch.unflatten(tensor, channel, (size, -1))


def _sums_and_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w r P(g), sum(g xhat) and sum(g)."""
    every = [True, True, True]
    return _backward(g, x, weight, None, None, mean, rstd, True, eps, every)  # type: ignore[no-any-return]


def _slow_in_torch(x: Tensor, elements: int) -> bool:
    if not x.is_cpu or x.numel() <= elements * torch.get_num_threads() ** 2:
        return False
    return x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def _torchs_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> _Forward:
    if running is None:
        running = Running.of_batch(x, x if weight is None else weight)
    y, mean, rstd = torch.native_batch_norm(
        x, weight, bias, running.mean, running.var, True, running.momentum, eps
    )
    return y, mean, rstd, running.var


def _cpu_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> _Forward:
    """The forward on large contiguous input on CPU.

    torch's own kernel adds such input up one element at a time: 470 us for [5, 64, 28, 28] on one
    core, where these passes take 120, and over fresh memory 170 instead of as much again.
    """
    count = x.numel() // x.shape[1]
    # Sums of squares are taken about the first sample's mean. It need not be close to the others':
    # being one of N, that sample is at most sqrt(N) standard deviations away from the mean.
    rough = x[0].mean(list(range(1, x.dim() - 1))) if x.dim() > 2 else x[0]
    centred = x - wide(rough, x)
    spread, total = _centred_sums(centred, centred, torch.zeros_like(rough), 1 / count)
    offset = total / count
    var = torch.addcmul(spread, offset, offset, value=-1).clamp_min_(0)
    # In place: a fresh output would cost more in page faults than the arithmetic does.
    nothing = centred.new_empty(0), centred.new_empty(0)
    out = (centred, *nothing)
    torch.native_batch_norm(centred, weight, bias, offset, var, False, 0.0, eps, out=out)
    mean, unbiased = rough + offset, var * (count / (count - 1))
    if running is not None:
        running.mean.lerp_(mean, running.momentum)
        running.var.lerp_(unbiased, running.momentum)
    return centred, mean, torch.rsqrt(var + eps), unbiased


def _centred_sums(a: Tensor, b: Tensor, mean: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns scale sum(a (b - mean)) and sum(a) by channel: one vectorised pass, no temporary.

    These are the weight and bias gradients of a batch norm with this 1 / sqrt(var).
    """
    rstd, sums = torch.full_like(mean, scale), [False, True, True]
    return _backward(a, b, None, None, None, mean, rstd, True, 0.0, sums)[1:]  # type: ignore[no-any-return]


class _BatchNorm(QuickFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: Running | None,
    ) -> Any:
        forward = _cpu_forward if _slow_in_torch(x, _LARGE) else _torchs_forward
        return forward(x, weight, bias, eps, running)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.eps, _ = inputs
        ctx.has_bias = bias is not None
        _, mean, rstd, var = output
        ctx.mark_non_differentiable(mean, rstd, var)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
        if g is None:
            return None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        # Without a graph wanted, the Function's own bookkeeping would be in vain.
        function: Any = _BatchNormBackward.apply if torch.is_grad_enabled() else _sums_and_backward
        dx, dw, db = function(g, x, weight, mean, rstd, ctx.eps)
        return dx, None if weight is None else dw, db if ctx.has_bias else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, eps: float, _: Any) -> Any:
        size = info.batch_size
        x = _fold(x, in_dims[0], size, 1)  # type: ignore[assignment]
        weight, bias = (
            _fold(t, dim, size, 0) for t, dim in zip((weight, bias), in_dims[1:3], strict=True)
        )
        apply: Any = _BatchNorm.apply
        y, *statistics = apply(x, weight, bias, eps, None)
        return (_unfold(y, size, 1), *(_unfold(t, size, 0) for t in statistics)), (1, 0, 0, 0)


class _BatchNormBackward(QuickFunction):
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
    """The double backward in the module docstring, with as few passes over memory as possible.

    With the sums known, what goes to x is g, u and x by a factor of its own for each channel.
    """
    g, x, weight, mean, rstd, dw, db = saved
    count = x.numel() / x.shape[1]
    slope = rstd if weight is None else rstd * weight
    to_g, u_xhat, u_sum = _sums_and_backward(u, x, weight, mean, rstd, eps)
    zero = torch.zeros_like(mean)
    u_g, _ = _centred_sums(u, g, zero, 1.0)
    share = slope / -count
    to_w = rstd * (u_g - torch.addcmul(u_sum * db, u_xhat, dw) / count)
    of_g = share * u_xhat if v is None else torch.addcmul(v, share, u_xhat)  # the factors in q
    of_u = share * dw
    q_sum, q_xhat = of_g * db, of_g * dw
    q_sum.addcmul_(of_u, u_sum)
    q_xhat.addcmul_(of_u, u_xhat)
    of_x = torch.addcmul(share * to_w, rstd, q_xhat, value=-1 / count).mul_(rstd)
    constant = (rstd * q_sum).div_(-count).addcmul_(of_x, mean, value=-1)
    # Batch norm in eval mode is the one kernel that scales and shifts by channel in a single pass.
    one = torch.ones_like(zero)
    to_x = torch.native_batch_norm(g, rstd * of_g, constant, zero, one, False, 0.0, 0.0)[0]
    to_x.addcmul_(u, wide(rstd * of_u, u)).addcmul_(x, wide(of_x, x))
    if v is not None:
        to_g.addcmul_(x, wide(v * rstd, x)).sub_(wide(v * rstd * mean, x))
    if s is not None:
        to_g.add_(wide(s, x))
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
