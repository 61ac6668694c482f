"""Max pooling of images by torch's vectorised kernel.

torch's CPU kernel for the default layout looks at one value at a time (2.13: 740 us for
[5, 64, 28, 28], an eighth of a first-order MAML iteration), the one for channels_last at a whole
vector: changing the layout there and back is half as long.

Derivatives need to know where the greatest values were. torch's also keep the feature map, make
zeros as its share of the second derivative, and gather in the default layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.quick_function import (
    QuickFunction,
    all_folded,
    folded,
    forward_mode_active,
    is_for_kernels,
    transforms_active,
)

_WORTH_A_FUNCTION = 100_000  # values; below, Python would take longer than is saved
_PIECE = 500_000  # values whose copy stays in the cache
_Sides = int | Sequence[int]


def max_pool2d(
    function: Any,
    second_order: bool,
    input: Tensor,
    kernel_size: _Sides,
    stride: _Sides | None = None,
    padding: _Sides = 0,
    dilation: _Sides = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Does what ``function`` does, ``torch.max_pool2d`` or the one of ``torch.nn.functional``.

    ``second_order`` says whether gradients of gradients will be asked for, a matter of speed alone.

    Whatever the quicker kernel is not for is left to ``function`` itself.
    """
    sides = (kernel_size, kernel_size if stride is None else stride, padding, dilation)
    if (
        return_indices
        or not all(type(side) is int or isinstance(side, (tuple, list)) for side in sides)
        or not is_for_kernels(input, "cpu")
        or input.dim() != 4
        or not (transforms_active() or _worth_it(input, second_order))
        or forward_mode_active()
    ):
        further = {"return_indices": True} if return_indices else {}
        how = (kernel_size, stride, padding, dilation, ceil_mode)
        return function(input, *how, **further)
    lists = [[side] if isinstance(side, int) else list(side) for side in sides]
    apply: Any = _MaxPool2d.apply
    return apply(input, (*lists, ceil_mode))[0]


def _worth_it(x: Tensor, second_order: bool) -> bool:
    differently = (second_order and x.requires_grad) or not _ready(x)
    return x.numel() >= _WORTH_A_FUNCTION and differently


def _ready(x: Tensor) -> bool:
    """Returns whether torch's own function takes the quick kernel for ``x``."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _by_torch(x: Tensor, how: Any) -> Any:
    return torch.ops.aten.max_pool2d_with_indices(x, *how)


def _in_pieces(x: Tensor, how: Any) -> Any:
    """Pools some images at a time, so that the copy in the other layout stays in the cache."""
    outputs: Any = None
    at_once = max(1, _PIECE * len(x) // x.numel())
    for start in range(0, len(x), at_once):
        piece = slice(start, start + at_once)
        pooled = _by_torch(x[piece].contiguous(memory_format=torch.channels_last), how)
        if outputs is None:
            # In the layout that torch's function hands on, as whatever follows expects it.
            outputs = [t.new_empty(len(x), *t.shape[1:]) for t in pooled]
        for output, part in zip(outputs, pooled, strict=True):
            output[piece] = part
    return tuple(outputs)


def _backward(g: Tensor, places: Tensor, shape: tuple[int, ...], how: Any) -> Tensor:
    layout = torch.channels_last if _ready(places) else torch.contiguous_format
    x = torch.empty(shape, dtype=g.dtype, memory_format=layout)  # its values are not read
    return torch.ops.aten.max_pool2d_with_indices_backward(g, x, *how, places)  # type: ignore[no-any-return]


class _MaxPool2d(QuickFunction):
    """The pooled images and where in its image each value was."""

    @staticmethod
    def forward(x: Tensor, how: Any) -> Any:
        return _by_torch(x, how) if _ready(x) or not x.numel() else _in_pieces(x, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.how = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
        if g is None:
            return None, None
        # Forward mode has torch's own formula; without further derivatives ours would be in vain.
        further = torch.is_grad_enabled() or transforms_active()
        ours = further and not forward_mode_active()
        function: Any = _MaxPool2dBackward.apply if ours else _backward
        return function(g, *ctx.saved_tensors, ctx.shape, ctx.how), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, how: Any) -> Any:
        size = info.batch_size
        many = folded(x, in_dims[0], size, 1)
        quick = many.numel() >= _WORTH_A_FUNCTION
        function: Any = _MaxPool2d.apply if quick else _by_torch
        # Left in the layout of convolutions and norms under vmap, tasks between images and
        # channels: a copy here and another in the next convolution would cost what was saved.
        return tuple(t.unflatten(1, (size, -1)) for t in function(many, how)), (1, 1)


class _MaxPool2dBackward(QuickFunction):
    """The backward of :class:`_MaxPool2d`: zeros, and ``g`` where the greatest values were."""

    @staticmethod
    def forward(g: Tensor, places: Tensor, shape: tuple[int, ...], how: Any) -> Tensor:
        return _backward(g, places, shape, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        # Linear in g. Channels last, and differentiable.
        (places,) = ctx.saved_tensors
        values, at = (t.movedim(1, 3).flatten(1, 2) for t in (u, places))
        to_g = values.gather(1, at).unflatten(1, places.shape[2:]).movedim(3, 1)
        return to_g, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, places: Tensor, shape: Any, how: Any) -> Any:
        size = info.batch_size
        many, at = all_folded((g, places), in_dims, size, (1, 1))
        shape = (shape[0], shape[1] * size, *shape[2:])
        apply: Any = _MaxPool2dBackward.apply
        return apply(many, at, shape, how).unflatten(1, (size, -1)), 1
