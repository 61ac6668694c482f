"""Norms and other layers with a row for every inner step, and what makes them of a model's own."""

from mamlpp_ext.norm.batch_norm import PerStepBatchNorm1d, PerStepBatchNorm2d, PerStepBatchNorm3d
from mamlpp_ext.norm.by_name import per_step_parameters
from mamlpp_ext.norm.convert import convert_batchnorm
from mamlpp_ext.norm.frozen import frozen_statistics
from mamlpp_ext.norm.fused_sequential import FusedSequential
from mamlpp_ext.norm.norm_conversion import convert_norm

__all__ = [
    "FusedSequential",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PerStepBatchNorm3d",
    "convert_batchnorm",
    "convert_norm",
    "frozen_statistics",
    "per_step_parameters",
]
