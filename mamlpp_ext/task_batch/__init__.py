"""A whole meta-batch of tasks at once, with ``torch.func``."""

from mamlpp_ext.task_batch.batch import Batch
from mamlpp_ext.task_batch.loss import TaskBatchResult, task_batch_loss
from mamlpp_ext.task_batch.module import TaskBatchLoss

__all__ = ["Batch", "TaskBatchLoss", "TaskBatchResult", "task_batch_loss"]
