"""Running statistics with a row for every inner step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import Running
from mamlpp_ext.norm.tables import spread_over_rows
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import held


class RunningStatistics(nn.Module):
    """Means and variances over the batches that each inner step has seen.

    Attributes:
        running_mean: [num_steps, num_features], or None.
        running_var: unbiased, [num_steps, num_features], or None.
        num_batches_tracked: how many batches each row has seen, int64 [num_steps], or None.
    """

    num_steps: int
    num_features: int
    momentum: float | None
    track_running_stats: bool
    inner_step: InnerStep
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def _make_statistics(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        shape, track = (self.num_steps, self.num_features), self.track_running_stats
        for name in ("running_mean", "running_var"):
            value = torch.empty(shape, device=device, dtype=dtype) if track else None
            self.register_buffer(name, value)
        counts = torch.zeros(self.num_steps, dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", counts if track else None)

    def reset_running_stats(self) -> None:
        """Sets every row's mean to 0, variance to 1 and count to 0."""
        if self.running_mean is None or self.running_var is None:
            return
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()  # type: ignore[union-attr]

    def _running(self, row: int, dtype: torch.dtype) -> Running | None:
        """Returns a row that a forward may write to itself, to be followed by ``_count``.

        None if it is for ``_record`` to take the statistics in: ones that are collected, averaged
        over all batches, or of another dtype.
        """
        mean, var = self.running_mean, self.running_var
        if (
            self.inner_step.collected is not None
            or self.momentum is None
            or mean is None
            or var is None
        ):
            return None
        if mean.dtype != dtype:
            return None
        return Running(mean.select(0, row), var.select(0, row), self.momentum)

    def _count(self, row: int) -> None:
        self.num_batches_tracked.select(0, row).add_(1)  # type: ignore[union-attr]

    def _record(self, row: int, mean: Tensor, var: Tensor) -> None:
        """Takes in a forward's batch mean [C] and unbiased variance [C]."""
        if self.inner_step.collected is not None:
            self.inner_step.collected.append(((self, row), mean, var))
            return
        try:
            if self.momentum is None:
                self.absorb(row, mean.unsqueeze(0), var.unsqueeze(0))
                return
            for table, batch in ((self.running_mean, mean), (self.running_var, var)):
                table.select(0, row).lerp_(batch.to(table.dtype), self.momentum)  # type: ignore[union-attr]
            self._count(row)
        except RuntimeError as error:
            raise RuntimeError(
                f"{type(self).__name__} could not update its running statistics in place. Inside a "
                "torch.func transform (vmap, grad, jvp) that is not possible: use "
                "mamlpp_ext.task_batch_loss, which collects and commits them, or wrap the call in "
                "mamlpp_ext.frozen_statistics(model)"
            ) from error

    def absorb(self, row: int, means: Tensor, variances: Tensor) -> None:
        """Takes a sequence of batches into the running statistics of one row, oldest first.

        The exponential (or, with ``momentum=None``, cumulative) average of n batches in one go;
        the result is that of n forwards one after the other.

        Args:
            row: the row to update.
            means: batch means, [n, C].
            variances: unbiased batch variances, [n, C].
        """
        n, dtype = means.shape[0], torch.promote_types(means.dtype, torch.float32)
        keep: Any
        # Made where they are used: what comes from or goes to the host would wait for a GPU.
        if self.momentum is None:
            seen = self.num_batches_tracked[row].to(dtype)  # type: ignore[index]
            keep, share = seen / (seen + n), (1 / (seen + n)).expand(n)
        else:
            ages = torch.arange(n - 1, -1, -1, dtype=dtype, device=means.device)
            keep, share = (1 - self.momentum) ** n, self.momentum * (1 - self.momentum) ** ages
        for table, batches in ((self.running_mean, means), (self.running_var, variances)):
            now = table[row]  # type: ignore[index]
            now.copy_(torch.addmv(now * keep, batches.to(now).T, share.to(now)))
        self.num_batches_tracked[row].add_(n)  # type: ignore[index]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Spreads the tensors of a plain layer's checkpoint over the rows, then loads."""
        tables = {**held(self, "parameters"), **held(self, "buffers")}
        spread_over_rows(state_dict, prefix, tables.items())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
