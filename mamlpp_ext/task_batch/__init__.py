"""A whole meta-batch of tasks at once, with ``torch.func``."""

from mamlpp_ext.task_batch.batch import Batch, Tasks, checked_batch
from mamlpp_ext.task_batch.loss import TaskBatchResult, task_batch_loss
from mamlpp_ext.task_batch.module import TaskBatchLoss
from mamlpp_ext.task_batch.settings import Loss

__all__ = [
    "Batch",
    "Loss",
    "TaskBatchLoss",
    "TaskBatchResult",
    "Tasks",
    "checked_batch",
    "task_batch_loss",
]
