"""Batch normalisation with statistics, weights and biases of its own for every inner step."""

from __future__ import annotations

from mamlpp_ext.norm.base import PerStepBatchNorm


class PerStepBatchNorm1d(PerStepBatchNorm):
    """Batch normalisation over [N, C] or [N, C, L] input with a row for every inner step.

    At inner step i the layer behaves as ``torch.nn.BatchNorm1d`` with weight, bias, running mean
    and running variance taken from row i:

        y = (x - mean) / sqrt(var + eps) * weight[i] + bias[i]

    In training mode mean and (biased) var are the batch's and row i's running statistics are
    updated, the variance unbiased; in eval mode they are row i's running statistics.

    Args:
        num_features: C, the number of channels.
        num_steps: the number of inner steps, i.e. rows.
        eps: added to the variance, in its unit.
        momentum: the share of the newest batch in the running statistics, 0 to 1; None keeps
            their cumulative average.
        affine: whether there are weights and biases.
        track_running_stats: whether there are running statistics; without them batch statistics
            are used in eval mode too.
        extra_steps: what happens at steps beyond ``num_steps``: ``"error"`` raises, ``"last"``
            reuses the last row.
        device: where the tables are made.
        dtype: the dtype of the tables.

    Shape:
        - input and output: [N, C] or [N, C, L]
        - weight, bias, running_mean, running_var: [num_steps, C]; num_batches_tracked: [num_steps]

    Raises:
        TypeError: if ``num_features`` or ``num_steps`` is not a whole number.
        ValueError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> norm = PerStepBatchNorm1d(3, num_steps=5)
        >>> norm(torch.randn(8, 3)).shape
        torch.Size([8, 3])
        >>> norm.weight.shape
        torch.Size([5, 3])

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4: per-step batch
        normalisation running statistics (BNRS), weights and biases (BNWB).
    """

    _ranks = (2, 3)
    _shape = "[N, C] or [N, C, L]"


class PerStepBatchNorm2d(PerStepBatchNorm):
    """Batch normalisation over [N, C, H, W] input with a row for every inner step.

    Equation, arguments, tables and errors are those of :class:`PerStepBatchNorm1d`.

    Shape:
        - input and output: [N, C, H, W]
        - weight, bias, running_mean, running_var: [num_steps, C]; num_batches_tracked: [num_steps]

    Example:
        >>> import torch
        >>> norm = PerStepBatchNorm2d(3, num_steps=5)
        >>> norm(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])

    Source:
        As :class:`PerStepBatchNorm1d`.
    """

    _ranks = (4,)
    _shape = "[N, C, H, W]"


class PerStepBatchNorm3d(PerStepBatchNorm):
    """Batch normalisation over [N, C, D, H, W] input with a row for every inner step.

    Equation, arguments, tables and errors are those of :class:`PerStepBatchNorm1d`.

    Shape:
        - input and output: [N, C, D, H, W]
        - weight, bias, running_mean, running_var: [num_steps, C]; num_batches_tracked: [num_steps]

    Example:
        >>> import torch
        >>> norm = PerStepBatchNorm3d(3, num_steps=5)
        >>> norm(torch.randn(8, 3, 2, 4, 4)).shape
        torch.Size([8, 3, 2, 4, 4])

    Source:
        As :class:`PerStepBatchNorm1d`.
    """

    _ranks = (5,)
    _shape = "[N, C, D, H, W]"
