"""What the scripts of the gallery share: a learner small enough to train while they run."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from few_shot import TaskSampler, conv_net, load
from learners import PARTS, Learner, Schedules

torch.set_num_threads(1)  # the tensors are small: more threads would wait for each other

WAYS, STEPS, EPOCHS, ITERATIONS = 10, 5, 20, 4  # an epoch is 4 iterations, the training 80


def make_learner(parts: Collection[str] = PARTS, inner_lr: float = 0.1) -> Learner:
    """Returns an untrained learner with some parts of MAML++."""
    torch.manual_seed(0)
    schedules = Schedules(
        EPOCHS, multi_step_loss=EPOCHS // 2, first_order=2, meta_lr=3e-3, final_meta_lr=1e-5
    )
    net = conv_net(channels=1, ways=WAYS, filters=16, size=8)
    return Learner(net, parts, "torch_func", steps=STEPS, inner_lr=inner_lr, schedules=schedules)


def training_tasks() -> TaskSampler:
    """Returns where training tasks come from: the digits 0 to 6 in four turns, always the same."""
    return TaskSampler(load().train, WAYS, shots=1, targets=5, tasks=2)


def unseen_tasks() -> TaskSampler:
    """Returns where tasks of the digits 7, 8 and 9 come from, always the same."""
    return TaskSampler(load().test, WAYS, shots=1, targets=5, tasks=8, seed=1)


def train_epoch(learner: Learner, tasks: TaskSampler) -> None:
    """Trains for an epoch and moves every schedule to the next one."""
    for _ in range(ITERATIONS):
        learner.train_on(tasks.sample())
    learner.end_epoch()
