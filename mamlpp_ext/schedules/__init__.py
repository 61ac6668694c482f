"""What changes from epoch to epoch: the weights of the step losses, the order of derivatives."""

from mamlpp_ext.schedules.derivative_order import DerivativeOrderAnnealing
from mamlpp_ext.schedules.multi_step_loss import (
    FinalStepLoss,
    MultiStepLoss,
    multi_step_loss_weights,
)

__all__ = [
    "DerivativeOrderAnnealing",
    "FinalStepLoss",
    "MultiStepLoss",
    "multi_step_loss_weights",
]
