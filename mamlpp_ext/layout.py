"""The layout channels_last, in which torch's CPU kernels for images are at their fastest.

In the default layout torch (2.13) pools and normalises one value at a time, in channels_last a
vector at a time, and convolutions need not sort their memory anew: a first-order MAML iteration
takes three quarters of its time. What follows a convolution hands its layout on, so that it is
enough to lay out what the first one is called with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def channels_last(x: Tensor) -> Tensor:
    """Returns ``x`` [N, C, H, W] in channels_last."""
    if x.shape[1] == 1:
        # The memory is the same, but convolutions choose their layout by the strides.
        return x.squeeze(1).unsqueeze(3).movedim(3, 1)
    return x.contiguous(memory_format=torch.channels_last)


def view(function: Any, x: Tensor, *shape: Any, **named: Any) -> Tensor:
    """Does what ``function`` does, ``Tensor.view`` or ``view_as``, for any layout.

    Forwards flatten feature maps by ``view``, which channels_last refuses.
    """
    try:
        return function(x, *shape, **named)  # type: ignore[no-any-return]
    except RuntimeError:
        return function(x.contiguous(), *shape, **named)  # type: ignore[no-any-return]


def in_default_layout(outputs: Any, inputs: Any) -> Any:
    """Returns what a model returned in the layout that it would have by torch's own kernels.

    Args:
        outputs: tensors, or lists, tuples or dicts of such.
        inputs: what the model was called with; if images among them are channels_last by the
            caller's own choice, so may be the outputs.
    """
    if isinstance(outputs, Tensor) and outputs.dim() != 4:
        return outputs
    found, given = pytree.tree_leaves(outputs), pytree.tree_leaves(inputs)
    if any(map(_is_laid_out, given)) or not any(map(_is_laid_out, found)):
        return outputs
    return pytree.tree_map(lambda t: t.contiguous() if _is_laid_out(t) else t, outputs)


def _is_laid_out(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and not x.is_contiguous()
