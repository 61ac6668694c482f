"""Memory layouts: channels_last inside of a run of layers, torch's default layout at its ends.

In the default layout torch (2.13, CPU) pools and normalises one value at a time, in channels_last a
vector at a time, and convolutions need not sort their memory anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.fast_kernels.quick_function import QuickFunction
from mamlpp_ext.torch_private import transforms_active


def channels_last(x: Tensor) -> Tensor:
    """Returns ``x`` [N, C, H, W] in channels_last."""
    if x.shape[1] == 1:
        # The memory is the same, but convolutions choose their layout by the strides.
        return x.squeeze(1).unsqueeze(3).movedim(3, 1)
    return x.contiguous(memory_format=torch.channels_last)


def with_default_gradient(x: Tensor) -> Tensor:
    """Returns ``x``, whose gradient will arrive in the default layout, whatever follows.

    The gradient of a view to one dimension is laid out for that, by torch itself and for any order.
    """
    if not x.requires_grad:
        return x
    x = x.contiguous()
    return x.view(-1).view_as(x)


def in_default_layout(x: Tensor, pooled: bool) -> Tensor:
    """Returns a copy of a feature map [N, C, H, W] as torch's own layers would have laid it out.

    Args:
        x: in any layout.
        pooled: whether pooling was the last of them, by which vmap lays tasks out otherwise.
    """
    if not transforms_active():
        return x.clone(memory_format=torch.contiguous_format)
    apply: Any = _InDefaultLayout.apply
    return apply(x, pooled)  # type: ignore[no-any-return]


class _InDefaultLayout(QuickFunction):
    """Called within vmap, whose rule takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pooled: bool) -> Tensor:
        return in_default_layout(x, pooled)

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> Any:
        return arrived, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, pooled: bool) -> Any:
        # Behind torch's pooling tasks come first in memory, too, behind its norm after the images.
        place = 0 if pooled else 1
        return in_default_layout(x.movedim(in_dims[0], place), pooled).movedim(place, 0), 0
