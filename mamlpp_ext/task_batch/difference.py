"""How far two measurements of the same thing may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

# How far rounding may take two ways apart, as shares of a tensor's largest value and of that of all
# (a gradient may be nothing but rounding): through kinks and a second derivative it comes to many
# times its own size. What is wrong is wrong by half.
_ROUNDING = {torch.float64: (1e-5, 1e-8), torch.float32: (0.03, 3e-5)}
_COARSE = (0.3, 0.1)

# Losses and outputs, statistics, gradients, second derivatives.
Measured = list[list[Tensor]]


def difference(found: Measured, expected: Measured) -> str | None:
    """Says where two measurements differ by more than rounding, or None."""
    words = ("the losses or outputs", "the statistics", "the gradients", "the second derivatives")
    share, share_of_all = max(_rounding(t) for kind in expected for t in kind)
    for name, ours, theirs in zip(words, found, expected, strict=True):
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            shapes = [[tuple(t.shape) for t in kind] for kind in (ours, theirs)]
            return f"{name} are of shapes {shapes[0]}, not {shapes[1]}"
        largest_of_all = max((_largest(t.nan_to_num(0.0)) for t in theirs), default=0.0)
        for a, b in zip(ours, theirs, strict=True):
            different = (a != b) & ~(a.isnan() & b.isnan())
            apart = _largest((a.to(torch.complex128) - b)[different])
            largest = _largest(b.nan_to_num(0.0))
            if not apart <= share * largest + share_of_all * largest_of_all:
                return f"{name} are {apart:.2g} apart, the largest is {largest:.2g}"
    return None


def _rounding(t: Tensor) -> tuple[float, float]:
    kind = t.device.type
    coarse = torch.is_autocast_enabled(kind) or (t.is_cuda and torch.backends.cudnn.allow_tf32)
    if t.dtype in _ROUNDING and (t.dtype == torch.float64 or not coarse):
        return _ROUNDING[t.dtype]
    return _COARSE if t.is_floating_point() or t.is_complex() else (0.0, 0.0)


def _largest(t: Tensor) -> float:
    return float(t.to(torch.complex128).abs().max()) if t.numel() else 0.0
