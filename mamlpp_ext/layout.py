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

# What is inside of a tensor that a torch.func transform has wrapped; not public.
_functorch: Any = getattr(torch._C, "_functorch", None)


def channels_last(x: Tensor) -> Tensor:
    """Returns ``x`` [N, C, H, W] in channels_last."""
    if x.shape[1] == 1:
        # The memory is the same, but convolutions choose their layout by the strides.
        return x.squeeze(1).unsqueeze(3).movedim(3, 1)
    return x.contiguous(memory_format=torch.channels_last)


class Views:
    """Does what ``Tensor.view`` and ``view_as`` do, for channels_last too, which they refuse.

    Forwards flatten feature maps by them. What is returned for channels_last is of a copy, so that
    nobody may write to it: :meth:`end` says so if somebody did.
    """

    def __init__(self) -> None:
        self.copies: list[Tensor] = []

    def __call__(self, function: Any, x: Tensor, *shape: Any, **named: Any) -> Tensor:
        """Calls ``function``, one of the two."""
        try:
            return function(x, *shape, **named)  # type: ignore[no-any-return]
        except RuntimeError:
            # [N, C, H, W] or [C, H, W]; whatever else it refuses, it refuses.
            if x.dim() not in (3, 4) or not x.stride(-3) < x.stride(-1):
                raise
            self.copies.append(x.contiguous())
            return function(self.copies[-1], *shape, **named)  # type: ignore[no-any-return]

    def end(self) -> None:
        """Forgets the copies.

        Raises:
            RuntimeError: if one was written to.
        """
        copies, self.copies = self.copies, []
        if any(_innermost(copy)._version for copy in copies):
            raise RuntimeError(
                "the forward writes in place to a view of a feature map, which is a copy here: "
                "inside the adapters' innerloop_ctx, task_batch_loss and fast_kernels images are "
                "channels_last. Write to the feature map itself, or to what follows from it out of "
                "place, e.g. x.view(...).clamp(min=0)"
            )


def _innermost(x: Tensor) -> Tensor:
    """Returns the tensor that torch.func transforms have wrapped: theirs count no changes."""
    while _functorch is not None and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


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
