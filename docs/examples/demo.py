"""MAML against MAML++ on few-shot images: side by side, from one seed, for the same time.

    python docs/examples/demo.py --help

Each learner has a process and half of the cores of its own. What comes out is a table, a picture
and a JSON file; after Ctrl-C too, with what there is by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import queue
import signal
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from few_shot import FewShotData, TaskSampler, load
from learners import BACKENDS
from report import Bars, write_report
from training import Run, Settings

NAMES = ("MAML", "MAML++")
# Where the data decides. Omniglot's meta rate, first-order share and tasks were chosen on its
# validation characters (MAML++ reached 83.8 % from 1e-3 and 87.2 % from 3e-3); the digits' ones on
# the held-out digits 4 to 6.
DEFAULTS = {
    "digits": {
        "ways": 5,
        "filters": 64,
        "tasks": 4,
        "minutes": 2.0,
        "curve_tasks": 100,
        "eval_tasks": 1000,
        "first_order": 5,
        "meta_lr": 3e-3,
    },
    "omniglot": {
        "ways": 20,
        "filters": 32,
        "tasks": 2,
        "minutes": 10.0,
        "curve_tasks": 40,
        "eval_tasks": 500,
        "first_order": 50,
        "meta_lr": 3e-3,
    },
    "images": {  # those of the reduced ablation on CIFAR-FS
        "ways": 5,
        "filters": 32,
        "tasks": 4,
        "minutes": 10.0,
        "curve_tasks": 100,
        "eval_tasks": 600,
        "first_order": 5,
        "meta_lr": 3e-3,
    },
}
Message = tuple[str, str, Any]
DATA_HELP = (
    "omniglot28.npz, a folder of Omniglot's PNGs, or images of your own: a folder with train/, "
    "val/ and test/, each with a folder of images for each class; a folder of such class folders, "
    "split here; .npz files with uint8 images [classes, n, H, W] or [classes, n, H, W, 3] and an "
    "array split, or named by split (their folder, or a pattern in quotes)"
)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", help=DATA_HELP + "; else scikit-learn's digits")
    add_image_flags(parser)
    add("--backend", choices=BACKENDS, default="torchopt", help="default: %(default)s")
    add("--ways", type=int, help="classes in a task (digits and photographs 5, Omniglot 20)")
    add("--shots", type=int, default=1, help="support images of a class (%(default)s)")
    add("--targets", type=int, default=5, help="target images of a class (%(default)s)")
    add("--steps", type=int, default=5, help="inner steps (%(default)s)")
    add("--filters", type=int, help="channels of each convolution (digits 64, others 32)")
    add("--first-order", type=int, help="%% of MAML++'s time in first order (5, Omniglot 50)")
    add("--meta-lr", type=float, help="MAML++'s first meta rate (3e-3)")
    add("--tasks", type=int, help="tasks in a meta-batch (4, Omniglot 2)")
    add("--minutes", type=float, help="training time of each learner (digits 2, others 10)")
    add("--seed", type=int, default=0, help="of weights and tasks (%(default)s)")
    add("--inner-lr", type=float, default=0.1, help="inner rate to start from (%(default)s)")
    add("--eval-tasks", type=int, help="unseen tasks at the end (digits 1000, Omniglot 500, 600)")
    add("--eval-targets", type=int, default=15, help="target images of a class in those")
    add("--curve-tasks", type=int, help="tasks for a point of the curve (100, Omniglot 40)")
    add("--threads", type=int, default=max(1, cores() // 2), help="of each learner (%(default)s)")
    add("--out", type=Path, default=Path("demo"), help="folder for the results (%(default)s)")
    return parser


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what is said of images of one's own, here as in the ablation."""
    parser.add_argument("--size", type=int, help="bring images to this height and width")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror every second image of training, by chance (no; not for handwriting)",
    )
    parser.add_argument(
        "--cache",
        action="store_true",
        help="keep decoded images beside their folder; else in a temporary file while it runs",
    )


def read_flags(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[Settings, Path, FewShotData]:
    """Returns the settings, the folder for the results and the data; a bad flag ends the program.

    What no flag says depends on the data.
    """
    flags = vars(parser.parse_args(arguments))
    for name, value in flags.items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if numeric and name not in ("seed", "first_order") and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if flags["first_order"] is not None and not 0 <= flags["first_order"] <= 100:
        parser.error(f"--first-order must be 0 to 100 (%), got {flags['first_order']}")
    out, cache, flags["flip"] = flags.pop("out"), flags.pop("cache"), bool(flags["flip"])
    try:
        data = load(flags["data"], flags["size"], cache)
        fallback = DEFAULTS[data.name]
        flags.update({name: value for name, value in fallback.items() if flags[name] is None})
        settings = Settings(**flags)
        check(settings, data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return settings, out, data


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check(settings: Settings, data: FewShotData) -> None:
    """Makes sure that every kind of task can be drawn from the data.

    Raises:
        ValueError: if there is too little of it.
    """
    for images in (data.train, data.val, data.test):
        for targets in (settings.targets, settings.eval_targets):
            flip = settings.flip and images is data.train
            TaskSampler(images, settings.ways, settings.shots, targets, settings.tasks, flip=flip)


def work(
    name: str,
    settings: Settings,
    data: FewShotData,
    messages: Queue[Message],
    ready: Barrier,
    stop: Event,
) -> None:
    """What each process does: trains one learner and sends what there is to show."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the parent decides
    torch.set_num_threads(settings.threads)
    run = Run(
        name == "MAML++",
        settings,
        data,
        stop,
        lambda *progress: messages.put((name, "progress", progress)),
    )
    ready.wait(timeout=300)  # so that both train at the same time, on an equally busy machine
    run.train()
    messages.put((name, "results", run.results()))


def train_side_by_side(settings: Settings, data: FewShotData) -> dict[str, Any]:
    """Returns what each learner's process found, by name; fewer than two if one broke."""
    spawn = multiprocessing.get_context("spawn")
    messages, ready, stop = spawn.Queue(), spawn.Barrier(len(NAMES)), spawn.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stop.is_set():  # a second Ctrl-C does not wait for anything
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes while they start
    workers = {
        name: spawn.Process(
            target=work, args=(name, settings, data, messages, ready, stop), daemon=True
        )
        for name in NAMES
    }
    for worker in workers.values():
        worker.start()
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    results: dict[str, Any] = {}
    with Bars(NAMES, 60 * settings.minutes) as bars:
        while len(results) < len(NAMES):
            try:
                name, kind, content = messages.get(timeout=1)
            except queue.Empty:
                if any(worker.exitcode for worker in workers.values()):
                    stop.set()  # one broke, and has said why; keep what the other has
                    ready.abort()
                if not any(worker.is_alive() for worker in workers.values()):
                    break
                continue
            if kind == "results":
                results[name] = content
            else:
                bars.show(name, *content)
    return {name: results[name] for name in NAMES if name in results}


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    parser = make_parser()
    settings, out, data = read_flags(parser, arguments)
    print(data.summary(), flush=True)
    results = train_side_by_side(settings, data)
    if not results:
        return 1
    write_report(dataclasses.asdict(settings), results, out, data.summary())
    return 0 if len(results) == len(NAMES) else 1


if __name__ == "__main__":
    raise SystemExit(main())
