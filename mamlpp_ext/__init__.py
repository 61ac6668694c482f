"""MAML++ for the MAML you already have: drop-in parts for higher, torchopt and torch.func.

The six improvements of "How to train your MAML" (Antoniou, Edwards, Storkey, ICLR 2019):
multi-step loss, derivative-order annealing, per-step batch-norm statistics, weights and biases,
learned per-layer per-step inner rates, and cosine annealing of the meta rate (torch's own
``CosineAnnealingLR``).
"""

import torch

from mamlpp_ext.checks import check_version

# Before the imports below, which an older torch fails without a reason.
check_version("mamlpp_ext", "torch", torch.__version__)

from mamlpp_ext.check_setup import check_setup
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.lslr import LSLR, functional_call
from mamlpp_ext.norm import (
    FusedSequential,
    PerStepBatchNorm1d,
    PerStepBatchNorm2d,
    PerStepBatchNorm3d,
    convert_batchnorm,
    convert_norm,
    frozen_statistics,
    per_step_parameters,
)
from mamlpp_ext.schedules import (
    DerivativeOrderAnnealing,
    FinalStepLoss,
    MultiStepLoss,
    multi_step_loss_weights,
)
from mamlpp_ext.steps import at_step, inner_steps
from mamlpp_ext.task_batch import TaskBatchLoss, TaskBatchResult, task_batch_loss

__version__ = "1.0.0rc1"

__all__ = [
    "LSLR",
    "DerivativeOrderAnnealing",
    "FinalStepLoss",
    "FusedSequential",
    "MultiStepLoss",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PerStepBatchNorm3d",
    "TaskBatchLoss",
    "TaskBatchResult",
    "at_step",
    "check_setup",
    "convert_batchnorm",
    "convert_norm",
    "frozen_statistics",
    "functional_call",
    "inner_steps",
    "multi_step_loss_weights",
    "per_step_parameters",
    "task_batch_loss",
    "twice_differentiable",
]
