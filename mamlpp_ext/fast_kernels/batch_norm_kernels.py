"""What the closed-form batch norm runs: its forward, backward and double backward.

The notation is that of ``batch_norm``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_ext.fast_kernels.normalization import others, wide

# None: has_operators() is False, and nobody calls it.
_backward: Any = getattr(torch.ops.aten, "native_batch_norm_backward", None)
_backward = getattr(_backward, "default", None)
# Output, mean, 1 / sqrt(var + eps), unbiased var.
_Forward = tuple[Tensor, Tensor, Tensor, Tensor]
# Elements from which on several fast passes beat torch's single slow one with one thread: in a
# Function, and together with a Function's own cost. More threads help torch's pass more.
_LARGE, WORTH_A_FUNCTION = 50_000, 75_000
# Elements below which torch's own second derivative is quicker, for all of its forty temporaries.
SMALL = 12_000


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
    def of_batch(cls, x: Tensor, dtype: torch.dtype) -> Running:
        """Returns ones that become the statistics of ``x`` alone."""
        mean, var = x.new_zeros(2, x.shape[1], dtype=dtype)
        return cls(mean, var, 1.0)


def statistics_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """Returns the dtype of statistics of ``x``: the weight's, or without one at least float32."""
    return torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype


def sums_and_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns w r P(g), sum(g xhat) and sum(g)."""
    every = [True, True, True]
    if weight is None and (mean.dtype != x.dtype or not x.is_cpu):
        weight = torch.ones_like(mean)  # tells the kernel the dtype of statistics, or is needed
    found: tuple[Tensor, Tensor, Tensor]
    found = _backward(g, x, weight, None, None, mean, rstd, True, eps, every)
    return found


def slow_in_torch(x: Tensor, elements: int) -> bool:
    """Returns whether ``x``, of more than ``elements``, meets torch's slow pass (see above)."""
    if not x.is_cpu or x.numel() <= elements * torch.get_num_threads() ** 2:
        return False
    return x.is_contiguous() and x.dtype in (torch.float32, torch.float64)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> _Forward:
    """Returns output, mean, 1 / sqrt(var + eps) and unbiased var, which ``running`` takes in."""
    quickest = _cpu_forward if slow_in_torch(x, _LARGE) else _torchs_forward
    return quickest(x, weight, bias, eps, running)


def _torchs_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> _Forward:
    if running is None:
        running = Running.of_batch(x, statistics_dtype(x, weight))
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
    zero, rstd = torch.zeros_like(rough), torch.full_like(rough, 1 / count)
    spread, total = centred_sums(centred, centred, zero, rstd)
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


def centred_sums(a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rstd sum(a (b - mean)) and sum(a) by channel: one vectorised pass, no temporary.

    These are the weight and bias gradients of a batch norm.
    """
    sums = [False, True, True]
    # A weight makes no difference to the sums, but torch's CUDA kernel (2.11) cannot be without.
    return _backward(a, b, rstd, None, None, mean, rstd, True, 0.0, sums)[1:]  # type: ignore[no-any-return]


class Sums(NamedTuple):
    """Sums by channel, each [C], of what meets in a double backward.

    Attributes:
        g: of g.
        g_xhat: of g times xhat.
        u: of u.
        u_xhat: of u times xhat.
        u_g: of u times g.
    """

    g: Tensor
    g_xhat: Tensor
    u: Tensor
    u_xhat: Tensor
    u_g: Tensor


class Factors(NamedTuple):
    """What a double backward hands to x, by channel: ``g of_g + u of_u + x of_x + constant``."""

    of_g: Tensor
    of_u: Tensor
    of_x: Tensor
    constant: Tensor


def factors_to_x(
    sums: Sums, weight: Tensor | None, mean: Tensor, rstd: Tensor, v: Tensor | None, part: float
) -> tuple[Factors, Tensor]:
    """Returns what a double backward hands to x, and to the weight [C].

    Args:
        sums: of g and u.
        weight: [C] or None.
        mean: of the batch, [C].
        rstd: 1 / sqrt(var + eps), [C].
        v: what arrives at the weight's gradient, [C] or None.
        part: 1 / N.
    """
    shared = torch.addcmul(sums.u * sums.g, sums.u_xhat, sums.g_xhat)
    to_weight = torch.sub(sums.u_g, shared, alpha=part).mul_(rstd)
    share = (rstd if weight is None else rstd * weight) * rstd * -part
    of_g, of_u = share * sums.u_xhat, share * sums.g_xhat  # the factors in q, by r
    if v is not None:
        of_g.addcmul_(v, rstd)
    q_sum = (of_g * sums.g).addcmul_(of_u, sums.u)
    q_xhat = (of_g * sums.g_xhat).addcmul_(of_u, sums.u_xhat)
    of_x = (share * to_weight).addcmul_(rstd, q_xhat, value=-part)
    constant = q_sum.mul_(-part).addcmul_(of_x, mean, value=-1)
    return Factors(of_g, of_u, of_x, constant), to_weight


def double_backward(
    saved: tuple[Any, ...], eps: float, u: Tensor, v: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The double backward of ``batch_norm``, with as few passes over memory as possible.

    With the sums known, what goes to x is g, u and x by a factor of its own for each channel.
    """
    g, x, weight, mean, rstd, g_xhat, g_sum = saved
    part = x.shape[1] / x.numel()
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    to_g, u_xhat, u_sum = sums_and_backward(u, x, weight, mean, rstd, eps)
    u_g, _ = centred_sums(u, g, zero, one)
    sums = Sums(g_sum, g_xhat, u_sum, u_xhat, u_g)
    (of_g, of_u, of_x, constant), to_w = factors_to_x(sums, weight, mean, rstd, v, part)
    # Batch norm in eval mode is the one kernel that scales and shifts by channel in a single pass.
    to_x = torch.native_batch_norm(g, of_g, constant, zero, one, False, 0.0, 0.0)[0]
    to_x.addcmul_(u, wide(of_u, u)).addcmul_(x, wide(of_x, x))
    if v is not None:
        to_g.addcmul_(x, wide(v * rstd, x)).sub_(wide(v * rstd * mean, x))
    if s is not None:
        to_g.add_(wide(s, x))
    return to_g, to_x, to_w


def double_backward_reference(
    saved: tuple[Any, ...], eps: float, u: Tensor, v: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`double_backward` computes, composed of differentiable operations."""
    g, x, weight, mean, *_ = saved
    dtype, dims = x.dtype, others(x)
    g, x, u = (t.to(mean.dtype) for t in (g, x, u))

    def average(t: Tensor) -> Tensor:
        return t.mean(dims, keepdim=True)

    def project(t: Tensor) -> Tensor:
        return t - average(t) - xhat * average(t * xhat)

    centred = x - average(x)
    rstd = torch.rsqrt(average(centred.square()) + eps)
    xhat = centred * rstd
    slope = rstd if weight is None else rstd * wide(weight, x)
    projected = project(u)
    to_g, to_w = slope * projected, (rstd * projected * g).sum(dims)
    to_x = -slope * (average(g * xhat) * u + average(u * xhat) * g)
    share = average(to_g * g)
    if v is not None:
        to_g, to_x = to_g + wide(v, x) * xhat, to_x + wide(v, x) * g
    if s is not None:
        to_g = to_g + wide(s, x)
    to_x = rstd * (project(to_x) - share * xhat)
    return to_g.to(dtype), to_x.to(dtype), to_w
