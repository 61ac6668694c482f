"""What the per-step batch norms for 1d, 2d and 3d input share: all but the ranks they accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from mamlpp_ext.checks import ExtraSteps, checked_count, checked_extra_steps
from mamlpp_ext.fast_kernels import (
    Running,
    batch_normalize,
    batch_normalize_into,
    batch_normalize_reference,
    normalize,
    statistics_dtype,
)
from mamlpp_ext.norm.running_statistics import RunningStatistics
from mamlpp_ext.norm.tables import current_place
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import has_operators, transforms_active

# An output, and the batch mean and unbiased variance that were measured, each [C].
Measured = tuple[Tensor, Tensor, Tensor]


class Row(NamedTuple):
    """What a layer normalises an input with.

    Attributes:
        place: of the row in the tables.
        weight: [C] or None.
        bias: [C] or None.
        by_batch: whether by the batch's statistics, not by the running ones.
        records: whether the running statistics take the batch's in.
    """

    place: int
    weight: Tensor | None
    bias: Tensor | None
    by_batch: bool
    records: bool


def _check_number(name: str, value: Any, low: float, high: float, also: str = "") -> None:
    legal = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not legal or not low <= value <= high or not math.isfinite(value):
        raise ValueError(
            f"{name} must be a number from {low:g} to {high:g}{also}, got {value!r}; "
            "nn.BatchNorm's default suits most models"
        )


def _is_composed() -> bool:
    """Returns whether torch traces it, and fuses plain operations itself, or lacks closed forms."""
    return torch.compiler.is_compiling() or not has_operators()


class PerStepBatchNorm(RunningStatistics):
    """Batch norm with a row for every inner step; subclasses say which ranks and shape it takes."""

    _ranks: tuple[int, ...]
    _shape: str
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        extra_steps: ExtraSteps = "error",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = checked_count("num_features", num_features)
        self.num_steps = checked_count("num_steps", num_steps)
        _check_number("eps", eps, 0.0, 1.0)
        if momentum is not None:
            _check_number("momentum", momentum, 0.0, 1.0, " or None")
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.extra_steps = checked_extra_steps(extra_steps)
        self.inner_step = InnerStep()
        shape = (self.num_steps, self.num_features)
        for name in ("weight", "bias"):
            value = torch.empty(shape, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self._make_statistics(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every row's weight to 1 and bias to 0, and resets the statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input`` with the row of the current inner step.

        Args:
            input: shape as in the class docstring, C = ``num_features``.

        Returns:
            The same shape and dtype.

        Raises:
            RuntimeError: within a backward, unless inside :func:`at_step`.
            TypeError: for input that is not floating-point.
            ValueError: for another rank or number of channels, a single value per channel where
                batch statistics are needed, or an inner step beyond the rows.
        """
        if has_torch_function((input,)):
            # One function to subclasses and modes, as torch's own are, not each call that it makes.
            return handle_torch_function(self._normalize, (input,), input)
        return self._normalize(input)

    def _normalize(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} expects floating-point input, got {input.dtype}; convert "
                "it, e.g. with .float()"
            )
        row = self.current_row(input.shape)
        if row.by_batch:
            return self.normalized(input, row)
        mean, var = self.running_mean[row.place], self.running_var[row.place]  # type: ignore[index]
        return normalize(input, mean, var, row.weight, row.bias, self.eps)

    def current_row(self, shape: torch.Size) -> Row:
        """Returns what input of this shape is normalised with at the current inner step.

        Raises:
            RuntimeError: as :meth:`forward`.
            ValueError: likewise.
        """
        self._check_shape(shape)
        step, index = self.inner_step, current_place(self)
        weight, bias = self.weight, self.bias
        # Contiguous, or torch's kernels for [N, C] give wrong gradients (2.13, without an error).
        weight = None if weight is None else weight.select(0, index).contiguous()
        bias = None if bias is None else bias.select(0, index).contiguous()
        by_batch = (
            self.training
            or not self.track_running_stats
            or step.frozen
            or self.running_mean is None
            or self.running_var is None
        )
        if by_batch and shape.numel() // self.num_features < 2:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 value per channel to compute batch "
                f"statistics, got input of shape {tuple(shape)}; give it a larger batch, or "
                "call .eval() to normalise by running statistics"
            )
        records = self.training and self.track_running_stats and not step.frozen
        return Row(index, weight, bias, by_batch, records)

    def by_statistics_of(
        self, row: Row, dtype: torch.dtype, compute: Callable[[Running | None], Measured]
    ) -> Tensor:
        """Returns what ``compute`` does, and takes in the statistics that it has measured.

        Args:
            row: the current one.
            dtype: of the statistics.
            compute: normalises by the batch. It is called with what takes its statistics in at
                once, or None, and returns the output, the mean and the unbiased variance, each [C].
        """
        written = row.records and not (transforms_active() or _is_composed())
        running = self._running(row.place, dtype) if written else None
        output, mean, var = compute(running)
        self._take_in(row, running, mean, var)
        return output

    def normalized(self, input: Tensor, row: Row) -> Tensor:
        """Returns ``input`` normalised by its own statistics, which are taken in."""
        composed = _is_composed()
        if composed or transforms_active():
            function = batch_normalize_reference if composed else batch_normalize
            output, mean, var = function(input, row.weight, row.bias, self.eps)
            self._take_in(row, None, mean, var)
            return output
        dtype = statistics_dtype(input, row.weight)
        running = self._running(row.place, dtype) if row.records else None
        into = running or Running.of_batch(input, dtype)
        first_order = self.inner_step.first_order
        output = batch_normalize_into(input, row.weight, row.bias, self.eps, into, first_order)
        self._take_in(row, running, into.mean, into.var)
        return output

    def _take_in(self, row: Row, running: Running | None, mean: Tensor, var: Tensor) -> None:
        if running is not None:  # it has them already
            self._count(row.place)
        elif row.records:
            self._record(row.place, mean, var)

    def _check_shape(self, shape: torch.Size) -> None:
        if len(shape) not in self._ranks:
            raise ValueError(
                f"{type(self).__name__} expects input of shape {self._shape}, got {tuple(shape)}; "
                "reshape it or use the layer for that number of dimensions"
            )
        if shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects {self.num_features} channels in dimension 1, got "
                f"{shape[1]} in input of shape {tuple(shape)}; build it with "
                f"num_features={shape[1]}"
            )

    def extra_repr(self) -> str:
        """Returns the settings for ``repr``."""
        return (
            f"{self.num_features}, num_steps={self.num_steps}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, extra_steps={self.extra_steps!r}"
        )
