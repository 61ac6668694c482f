"""MAML++ for the MAML you already have: drop-in parts for higher, torchopt and torch.func.

The six improvements of "How to train your MAML" (Antoniou, Edwards, Storkey, ICLR 2019):
multi-step loss, derivative-order annealing, per-step batch-norm statistics, weights and biases,
learned per-layer per-step inner rates, and cosine annealing of the meta rate (torch's own
``CosineAnnealingLR``).
"""

import torch

if not (2, 6) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) < (3, 0):
    raise ImportError(  # before the imports below, which an older torch fails without a reason
        f"mamlpp_ext needs torch from 2.6 up to, not including, 3.0, found {torch.__version__}; "
        "pip install 'torch>=2.6,<3'"
    )

from mamlpp_ext.batch_norm import PerStepBatchNorm1d, PerStepBatchNorm2d, PerStepBatchNorm3d
from mamlpp_ext.convert import convert_batchnorm
from mamlpp_ext.derivative_order import DerivativeOrderAnnealing
from mamlpp_ext.findings import check_setup
from mamlpp_ext.frozen import frozen_statistics
from mamlpp_ext.kernels import fast_kernels
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.multi_step_loss import FinalStepLoss, MultiStepLoss, multi_step_loss_weights
from mamlpp_ext.steps import at_step, inner_steps
from mamlpp_ext.task_batch import TaskBatchResult, task_batch_loss
from mamlpp_ext.task_batch_module import TaskBatchLoss

__version__ = "0.1.0"

__all__ = [
    "LSLR",
    "DerivativeOrderAnnealing",
    "FinalStepLoss",
    "MultiStepLoss",
    "PerStepBatchNorm1d",
    "PerStepBatchNorm2d",
    "PerStepBatchNorm3d",
    "TaskBatchLoss",
    "TaskBatchResult",
    "at_step",
    "check_setup",
    "convert_batchnorm",
    "fast_kernels",
    "frozen_statistics",
    "inner_steps",
    "multi_step_loss_weights",
    "task_batch_loss",
]
