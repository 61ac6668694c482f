"""Batch statistics of all processes that share a meta-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mamlpp_ext.steps import BatchStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def gathered(
    chunks: tuple[BatchStatistics, ...], group: ProcessGroup
) -> tuple[BatchStatistics, ...]:
    """Returns the chunks of all ranks of ``group``, the tasks in the order of the ranks.

    Args:
        chunks: of each chunk of tasks in turn.
        group: the processes, each with as many tasks and chunks.

    Raises:
        ValueError: if this process is not in ``group``, or the processes have unlike chunks.
    """
    values = [value for statistics in chunks for _, *values in statistics for value in values]
    if not values:  # no per-step layer, or none that keeps statistics at present
        return chunks
    if dist.get_rank(group) < 0:  # the collectives would only warn, the statistics be lost
        raise ValueError(
            "this process is not in process_group; give each process a group that it is in, such "
            "as torch.distributed.group.WORLD"
        )
    mine = torch.cat([value.flatten() for value in values])
    _check_alike(sum(len(statistics[0][1]) for statistics in chunks), mine, group)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group)
    return tuple(statistics for flat in everyones for statistics in _like(chunks, flat))


def _check_alike(tasks: int, mine: Tensor, group: ProcessGroup) -> None:
    # Of unlike sizes, all_gather would hang or mix up memory, and equal weights in the mean of the
    # gradients would be wrong.
    here = (tasks, mine.numel())
    ends = torch.tensor([*here, *(-size for size in here)], device=mine.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    most_tasks, most_values, *least = ends.tolist()
    if [-most_tasks, -most_values] != least:
        raise ValueError(
            f"the processes of process_group must have as many tasks of a meta-batch and the same "
            f"settings, got {-least[0]} to {most_tasks} tasks with {-least[1]} to {most_values} "
            f"numbers of statistics, here {tasks} with {mine.numel()}; make the number of tasks a "
            "multiple of the number of processes"
        )


def _like(chunks: tuple[BatchStatistics, ...], flat: Tensor) -> list[BatchStatistics]:
    """Cuts ``flat`` into chunks of the shapes of ``chunks``."""
    sizes = [
        value.numel() for statistics in chunks for _, *values in statistics for value in values
    ]
    pieces = iter(torch.split(flat, sizes))
    return [
        [
            (place, next(pieces).view_as(mean), next(pieces).view_as(var))
            for place, mean, var in statistics
        ]
        for statistics in chunks
    ]
