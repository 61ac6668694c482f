"""Normalisation of each channel, composed of torch's differentiable operations."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_normalize_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``closed_form.batch_normalize`` computes, composed of differentiable operations."""
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    mean = x.mean(others(x))
    centred = x - wide(mean, x)
    var = centred.square().mean(others(x))
    output = centred * wide(torch.rsqrt(var + eps), x)
    if weight is not None:
        output = output * wide(weight, x)
    if bias is not None:
        output = output + wide(bias, x)
    count = x.numel() // x.shape[1]
    return output.to(dtype), mean, var * count / (count - 1)


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalises each channel by given statistics, each [C]; the result has the dtype of ``x``."""
    # At least float32, as torch's kernels: half precision would lose the product mean * scale.
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (mean, var))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(wide(shift, x), x, wide(scale, x)).to(x.dtype)


def others(x: Tensor) -> list[int]:
    """Returns the dimensions other than the channels'."""
    return [0, *range(2, x.dim())]


def wide(channel: Tensor, like: Tensor) -> Tensor:
    """Returns a value for each channel in a shape that broadcasts with ``like``."""
    return channel.view(1, -1, *[1] * (like.dim() - 2))
