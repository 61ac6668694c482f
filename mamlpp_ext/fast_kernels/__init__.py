"""Torch's layers in second order: closed forms where it is slow, other kernels where it has none.

Functions of tensors: they know nothing of rows or inner steps.
"""

from mamlpp_ext.fast_kernels.batch_norm import batch_normalize, batch_normalize_into
from mamlpp_ext.fast_kernels.batch_norm_kernels import Running, statistics_dtype
from mamlpp_ext.fast_kernels.convolution import Geometry, convolve, has_slow_weight_gradient
from mamlpp_ext.fast_kernels.layout import in_default_layout, with_default_gradient
from mamlpp_ext.fast_kernels.norm_act_pool import activate_pool, normalize_activate_pool
from mamlpp_ext.fast_kernels.norm_act_pool_kernels import Layers
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference, normalize
from mamlpp_ext.fast_kernels.quick_function import QuickFunction, save
from mamlpp_ext.fast_kernels.second_order import check_second_derivatives, twice_differentiable

__all__ = [
    "Geometry",
    "Layers",
    "QuickFunction",
    "Running",
    "activate_pool",
    "batch_normalize",
    "batch_normalize_into",
    "batch_normalize_reference",
    "check_second_derivatives",
    "convolve",
    "has_slow_weight_gradient",
    "in_default_layout",
    "normalize",
    "normalize_activate_pool",
    "save",
    "statistics_dtype",
    "twice_differentiable",
    "with_default_gradient",
]
