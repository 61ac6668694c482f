"""Batch statistics of all processes that share a meta-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mamlpp_ext.steps import Tape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def gathered(tapes: tuple[Tape, ...], group: ProcessGroup) -> tuple[Tape, ...]:
    """Returns the tapes of all ranks of ``group``, the tasks in the order of the ranks.

    Args:
        tapes: of each chunk of tasks in turn.
        group: the processes, each with as many tasks and chunks.
    """
    values = [value for tape in tapes for _, *values in tape for value in values]
    if not values:  # no per-step layer, or none that keeps statistics at present
        return tapes
    mine = torch.cat([value.flatten() for value in values])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group)
    return tuple(tape for flat in everyones for tape in _like(tapes, flat))


def _like(tapes: tuple[Tape, ...], flat: Tensor) -> list[Tape]:
    """Cuts ``flat`` into tapes of the shapes of ``tapes``."""
    sizes = [value.numel() for tape in tapes for _, *values in tape for value in values]
    pieces = iter(torch.split(flat, sizes))
    return [
        [(place, *(next(pieces).view_as(value) for value in values)) for place, *values in tape]  # type: ignore[misc]
        for tape in tapes
    ]
