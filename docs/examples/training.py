"""One learner's training against the clock, with an evaluation at every tenth of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch import Tensor

from few_shot import Batch, FewShotData, TaskSampler, conv_net, summary
from image_store import Images
from learners import PARTS, STATISTICS, Learner, Schedules

# The papers count 500 iterations as an epoch. Here the time is given and not the iterations, so an
# epoch is a hundredth of the time: every schedule then ends where it should on any machine.
EPOCHS = 100
# MAML's meta rate is the usual one, and was the better one in validation too, one run each.
# Held-out digits 4 to 6: 86.9 %, and 81.1 % at 3e-3 (MAML++ from 3e-3: 88.4 %). Omniglot's
# validation characters after 600 iterations of 4 tasks: 85.4 %, and 78.1 % at 3e-3.
PLAIN_META_LR, FINAL_META_LR = 1e-3, 1e-5
MULTI_STEP_LOSS_EPOCHS = 10
CURVE_EVERY = 10  # epochs
SECONDS_AFTER_INTERRUPT = 5.0

Show = Callable[[float, float, float, int], None]


@dataclass(frozen=True)
class Settings:
    """What the flags say; ``--help`` describes them."""

    data: str | None
    backend: str
    ways: int
    shots: int
    targets: int
    steps: int
    filters: int
    tasks: int
    minutes: float
    seed: int
    eval_tasks: int
    eval_targets: int
    curve_tasks: int
    inner_lr: float
    first_order: int
    meta_lr: float
    threads: int
    size: int | None
    flip: bool


class Run:
    """One learner's training and evaluation.

    Args:
        plus: whether it is MAML++.
        settings: the flags.
        data: where the tasks come from.
        stop: ends the training early once it is set.
        show: called after each meta-iteration with seconds, loss, meta rate and iterations.
    """

    def __init__(
        self, plus: bool, settings: Settings, data: FewShotData, stop: Event, show: Show
    ) -> None:
        self.settings, self.data, self.stop, self.show = settings, data, stop, show
        torch.manual_seed(settings.seed)
        self.learner = Learner(
            conv_net(data.channels, settings.ways, settings.filters, data.size),
            PARTS if plus else (),
            settings.backend,
            steps=settings.steps,
            inner_lr=settings.inner_lr,
            schedules=Schedules(
                EPOCHS,
                MULTI_STEP_LOSS_EPOCHS,
                settings.first_order,
                settings.meta_lr if plus else PLAIN_META_LR,
                FINAL_META_LR,
            ),
        )
        self.sampler = self._sampler(data.train, settings.targets, settings.seed, settings.flip)
        self.seconds, self.iterations = 0.0, 0
        self.history: list[dict[str, Any]] = []
        self.curve: list[dict[str, float]] = []

    def train(self) -> None:
        """Trains until the time is up; what the evaluations take is not counted."""
        for epoch in range(EPOCHS):
            if epoch % CURVE_EVERY == 0:
                self._measure_curve()
            losses = self._train_until(60 * self.settings.minutes * (epoch + 1) / EPOCHS)
            self.history.append(
                {
                    "epoch": epoch,
                    "seconds": self.seconds,
                    "iterations": self.iterations,
                    "loss": sum(losses) / len(losses) if losses else None,
                    "meta_lr": self.learner.meta_lr,
                    "second_order": self.learner.da.second_order,
                    "loss_weights": self.learner.loss_weights(),
                }
            )
            if self.stop.is_set():
                break
            if epoch < EPOCHS - 1:
                self.learner.end_epoch()
        self._measure_curve()

    def _train_until(self, seconds: float) -> list[float]:
        losses = []
        while self.seconds < seconds and not self.stop.is_set():
            began = time.perf_counter()
            losses.append(self.learner.train_on(self.sampler.sample()))
            self.seconds += time.perf_counter() - began
            self.iterations += 1
            self.show(self.seconds, losses[-1], self.learner.meta_lr, self.iterations)
        return losses

    def _measure_curve(self) -> None:
        found = self.accuracy(self.data.val, self.settings.curve_tasks, seed=1)
        self.curve.append(
            {"seconds": self.seconds, "iterations": self.iterations, **found["batch_statistics"]}
        )

    def accuracy(
        self, images: Tensor | Images, count: int, seed: int
    ) -> dict[str, dict[str, float]]:
        """Returns both accuracies on ``count`` tasks, always the same ones for a seed."""
        sampler = self._sampler(images, self.settings.eval_targets, seed)
        found = self.learner.accuracies(self._tasks(sampler, count))
        return {name: summary(row) for name, row in zip(STATISTICS, found, strict=True)}

    def _tasks(self, sampler: TaskSampler, count: int) -> Iterator[Batch]:
        deadline = math.inf
        for _ in range(math.ceil(count / sampler.tasks)):
            yield sampler.sample()
            if self.stop.is_set():
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_INTERRUPT)
            if time.monotonic() > deadline:
                return

    def _sampler(
        self, images: Tensor | Images, targets: int, seed: int, flip: bool = False
    ) -> TaskSampler:
        s = self.settings
        return TaskSampler(images, s.ways, s.shots, targets, s.tasks, seed, flip)

    def results(self) -> dict[str, Any]:
        """Evaluates on unseen tasks and returns everything that is known of this run."""
        return {
            "iterations": self.iterations,
            "seconds": self.seconds,
            "ms_per_iteration": 1e3 * self.seconds / max(self.iterations, 1),
            **self.accuracy(self.data.test, self.settings.eval_tasks, seed=2),
            "interrupted": self.stop.is_set(),
            "curve": self.curve,
            "history": self.history,
            **self.learner.description(),
        }
