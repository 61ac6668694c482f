"""The gradients that a model is adapted by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from mamlpp_ext.torch_private import graph_names

RECOMPUTED = (
    "activation checkpointing (torch.utils.checkpoint, a model's gradient_checkpointing_enable()) "
    "or another hook of saved tensors inside the forward: a backward would run its layers again "
    "with the weights that stand in the model by then, not those of the step; turn it off "
    "(gradient_checkpointing_disable()), and save memory with task_batch_loss(..., "
    "rematerialize=True) or its chunk_size"
)


def support_gradients(
    loss: Tensor, params: Sequence[Tensor], *, create_graph: bool, first: bool
) -> list[Tensor | None]:
    """Returns the gradients of a support loss; None where none arrives.

    Args:
        loss: 0-dim.
        params: that may be adapted; those that need no gradient get None.
        create_graph: whether gradients of them will be asked for.
        first: whether it is the first step of its loop, whose graph is looked through.

    Raises:
        RuntimeError: if layers are checkpointed.
    """
    if first:
        check_reentrant(loss)
    wanted = [p for p in params if p.requires_grad]
    with without_hooks():
        found = iter(
            torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True)
        )
    return [next(found) if p.requires_grad else None for p in params]


def check_reentrant(output: Tensor) -> None:
    """Refuses the older, reentrant checkpointing, whose weights get no gradient at all."""
    if "CheckpointFunctionBackward" in graph_names(output):
        raise RuntimeError(RECOMPUTED)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Refuses hooks of saved tensors, which checkpointing sets where it runs layers again."""
    try:
        context = disable_saved_tensors_hooks(RECOMPUTED)
        context.__enter__()
    except RuntimeError:  # somebody's are around all of this, such as save_on_cpu
        yield
        return
    try:
        yield
    finally:
        context.__exit__(None, None, None)
