"""What the scripts of the guides share: tasks of handwritten digits, and the measurement.

Five classes, one support and five target images of each; quarter turns are classes of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from few_shot import Batch, TaskSampler, load, mean_and_interval, task_accuracies

WAYS, SHOTS, TARGETS, TASKS, STEPS = 5, 1, 5, 4, 5


def tasks(seed: int, tests: int) -> tuple[TaskSampler, list[Batch]]:
    """Returns what draws the meta-batches to train on, and ``tests`` batches of unseen classes."""
    data = load()
    unseen = TaskSampler(data.test, WAYS, SHOTS, TARGETS, TASKS, seed=1)
    train = TaskSampler(data.train, WAYS, SHOTS, TARGETS, TASKS, seed)
    return train, [unseen.sample() for _ in range(tests)]


def evaluate(epoch: int, predict: Callable[[Batch], Tensor], batches: list[Batch]) -> float:
    """Prints and returns the accuracy of ``predict``, which returns logits [T, Q, ways]."""
    right = [task_accuracies(predict(batch), batch[3]) for batch in batches]
    accuracy, interval = mean_and_interval(torch.cat(right))
    print(f"epoch {epoch}: accuracy {100 * accuracy:.1f} ± {100 * interval:.1f} %")
    return accuracy
