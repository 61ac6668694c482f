"""Norms and other layers with a row for every inner step, and what makes them of a model's own."""

from mamlpp_ext.norm.any_layer import per_step_parameters
from mamlpp_ext.norm.batch_norm import PerStepBatchNorm1d, PerStepBatchNorm2d, PerStepBatchNorm3d
from mamlpp_ext.norm.containers import MOST, all_in, fill, ids_in, parts_of
from mamlpp_ext.norm.convert_batch_norm import convert_batchnorm
from mamlpp_ext.norm.convert_norms import convert_norm
from mamlpp_ext.norm.frozen import frozen_statistics
from mamlpp_ext.norm.fused_sequential import FusedSequential
from mamlpp_ext.norm.references import References, parts_looked_into

__all__ = [
    "MOST",
    "FusedSequential",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PerStepBatchNorm3d",
    "References",
    "all_in",
    "convert_batchnorm",
    "convert_norm",
    "fill",
    "frozen_statistics",
    "ids_in",
    "parts_looked_into",
    "parts_of",
    "per_step_parameters",
]
