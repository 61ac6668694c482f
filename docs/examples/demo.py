"""MAML against MAML++ on few-shot handwriting: side by side, from one seed, for the same time.

    python docs/examples/demo.py --help

Each learner has a process and half of the cores of its own. What comes out is a table, a picture
and a JSON file; after Ctrl-C too, with what there is by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from few_shot import Batch, FewShotData, TaskSampler, conv_net, load, mean_and_interval
from learners import BACKENDS, Learner, Schedules
from report import Bars, write_report

# The papers count 500 iterations as an epoch. Here the time is given and not the iterations, so an
# epoch is a hundredth of the time: every schedule then ends where it should on any machine.
EPOCHS = 100
SCHEDULES = Schedules(epochs=EPOCHS, multi_step_loss=10, first_order=30)
CURVE_EVERY = 10  # epochs
SECONDS_AFTER_INTERRUPT = 5.0
NAMES = ("MAML", "MAML++")
DEFAULTS = {
    "digits": {"ways": 5, "filters": 32, "minutes": 2.2, "curve_tasks": 100},
    "omniglot": {"ways": 20, "filters": 32, "minutes": 10.0, "curve_tasks": 40},
}
Show = Callable[[float, float, float, int], None]
Message = tuple[str, str, Any]


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
    threads: int


def parse(arguments: list[str] | None = None) -> tuple[Settings, Path]:
    """Returns the settings and the folder for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help="omniglot28.npz or a folder of Omniglot's PNGs; else scikit-learn's digits")
    add("--backend", choices=BACKENDS, default="torch_func", help="default: %(default)s")
    add("--ways", type=int, help="classes in a task (digits 5, Omniglot 20)")
    add("--shots", type=int, default=1, help="support images of a class (%(default)s)")
    add("--targets", type=int, default=5, help="target images of a class (%(default)s)")
    add("--steps", type=int, default=5, help="inner steps (%(default)s)")
    add("--filters", type=int, help="channels of each convolution (32)")
    add("--tasks", type=int, default=4, help="tasks in a meta-batch (%(default)s)")
    add("--minutes", type=float, help="training time of each learner (digits 2.2, Omniglot 10)")
    add("--seed", type=int, default=0, help="of weights and tasks (%(default)s)")
    add("--inner-lr", type=float, default=0.1, help="inner rate to start from (%(default)s)")
    add("--eval-tasks", type=int, default=600, help="unseen tasks at the end (%(default)s)")
    add("--eval-targets", type=int, default=15, help="target images of a class in those")
    add("--curve-tasks", type=int, help="tasks for each point of the curve (digits 100, else 40)")
    add("--threads", type=int, default=max(1, cores() // 2), help="of each learner (%(default)s)")
    add("--out", type=Path, default=Path("demo"), help="folder for the results (%(default)s)")
    flags = vars(parser.parse_args(arguments))
    out = flags.pop("out")
    fallback = DEFAULTS["omniglot" if flags["data"] else "digits"]
    flags.update({name: value for name, value in fallback.items() if flags[name] is None})
    return Settings(**flags), out


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
            conv_net(1, settings.ways, settings.filters, data.train.shape[-1]),
            plus,
            settings.backend,
            steps=settings.steps,
            inner_lr=settings.inner_lr,
            schedules=SCHEDULES,
        )
        self.sampler = self._sampler(data.train, settings.targets, settings.seed)
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
        found = self.accuracy(self.data.val, self.settings.curve_tasks, seed=1, running=False)
        self.curve.append({"seconds": self.seconds, "iterations": self.iterations, **found})

    def accuracy(self, images: Tensor, count: int, seed: int, running: bool) -> dict[str, float]:
        """Returns the accuracy on ``count`` tasks, always the same ones for a seed."""
        sampler = self._sampler(images, self.settings.eval_targets, seed)
        found = self.learner.accuracies(self._tasks(sampler, count), running)
        mean, interval = mean_and_interval(found)
        return {"accuracy": mean, "interval": interval, "tasks": len(found)}

    def _tasks(self, sampler: TaskSampler, count: int) -> Iterator[Batch]:
        deadline = math.inf
        for _ in range(math.ceil(count / sampler.tasks)):
            yield sampler.sample()
            if self.stop.is_set():
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_INTERRUPT)
            if time.monotonic() > deadline:
                return

    def _sampler(self, images: Tensor, targets: int, seed: int) -> TaskSampler:
        s = self.settings
        return TaskSampler(images, s.ways, s.shots, targets, s.tasks, seed)

    def results(self) -> dict[str, Any]:
        """Evaluates on unseen tasks and returns everything that is known of this run."""
        test, count = self.data.test, self.settings.eval_tasks
        return {
            "iterations": self.iterations,
            "seconds": self.seconds,
            "ms_per_iteration": 1e3 * self.seconds / max(self.iterations, 1),
            "batch_statistics": self.accuracy(test, count, seed=2, running=False),
            "running_statistics": self.accuracy(test, count, seed=2, running=True),
            "interrupted": self.stop.is_set(),
            "curve": self.curve,
            "history": self.history,
            **self.learner.description(),
        }


def work(
    name: str, settings: Settings, messages: Queue[Message], ready: Barrier, stop: Event
) -> None:
    """What each process does: trains one learner and sends what there is to show."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the parent decides
    torch.set_num_threads(settings.threads)
    run = Run(
        name == "MAML++",
        settings,
        load(settings.data),
        stop,
        lambda *progress: messages.put((name, "progress", progress)),
    )
    ready.wait(timeout=300)  # so that both train at the same time, on an equally busy machine
    run.train()
    messages.put((name, "results", run.results()))


def train_side_by_side(settings: Settings) -> dict[str, Any]:
    """Returns what each learner's process found, by name; fewer than two if one broke."""
    spawn = multiprocessing.get_context("spawn")
    messages, ready, stop = spawn.Queue(), spawn.Barrier(len(NAMES)), spawn.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also for the processes while they start
    workers = {
        name: spawn.Process(target=work, args=(name, settings, messages, ready, stop), daemon=True)
        for name in NAMES
    }
    for worker in workers.values():
        worker.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    results: dict[str, Any] = {}
    with Bars(NAMES, 60 * settings.minutes) as bars:
        while any(name not in results for name, worker in workers.items() if worker.is_alive()):
            try:
                name, kind, content = messages.get(timeout=1)
            except queue.Empty:
                continue
            if kind == "results":
                results[name] = content
            else:
                bars.show(name, *content)
            if any(worker.exitcode for worker in workers.values()):
                stop.set()  # one broke, and has said why; keep what the other has
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    settings, out = parse(arguments)
    results = train_side_by_side(settings)
    if not results:
        return 1
    write_report(dataclasses.asdict(settings), results, out)
    return 0 if len(results) == len(NAMES) else 1


if __name__ == "__main__":
    raise SystemExit(main())
