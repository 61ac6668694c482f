"""The paper's ablation on Omniglot: MAML, each part of MAML++ alone, and all together.

    make ablation DATA=omniglot28.npz          the reduced protocol, which two cores finish
    python benchmarks/ablation.py --help       every flag
    python benchmarks/ablation.py --data omniglot28.npz --preset paper-omniglot-20way-1shot

Stopped in any way, the same command goes on where it was. A preset sets what no flag says. Results
go to --out: table.md, evaluations.jsonl (a record for every evaluation), pictures of accuracy over
iterations and of what the last row learned; TensorBoard scalars too, if its package is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

# The data, the network and the learner are those of the demonstration.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "examples"))

import torch

from ablation_protocol import PRESETS, ROWS, Protocol
from ablation_report import write_report
from ablation_run import AblationRun
from demo import cores
from few_shot import TaskSampler, load
from learners import BACKENDS


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser: a flag for every field of :class:`Protocol`, and some for the run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="omniglot28.npz, or a folder of Omniglot's PNGs")
    add("--preset", choices=PRESETS, default="reduced", help="default: %(default)s")
    add("--rows", nargs="+", choices=ROWS, help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    add("--out", type=Path, default=Path("ablation"), help="folder (default: %(default)s)")
    add(
        "--jobs",
        type=int,
        choices=range(1, 257),
        metavar="N",
        default=cores(),
        help="runs at once, a thread each (%(default)s)",
    )
    add("--device", default="cpu", help="where to train (%(default)s)")
    add("--checkpoint-minutes", type=float, default=2.0, help="between checkpoints (%(default)s)")
    for field in fields(Protocol):
        kind = {"str": str, "int": int}.get(str(field.type), float)
        choices = list(BACKENDS) if field.name == "backend" else None
        add(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            choices=choices,
            help=f"{field.metadata['help']} (reduced: {field.default})",
        )
    return parser


def read_protocol(flags: argparse.Namespace) -> Protocol:
    """Returns the preset with the flags that were given.

    Raises:
        ValueError: if a number is not above 0.
    """
    chosen = asdict(PRESETS[flags.preset])
    given = {name: getattr(flags, name) for name in chosen}
    chosen.update({name: value for name, value in given.items() if value is not None})
    for name, value in chosen.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("multi_step_loss", "first_order"):
            if value < 0:
                raise ValueError(f"{flag} must be at least 0 (epochs), got {value}")
        elif isinstance(value, (int, float)) and value <= 0:
            raise ValueError(f"{flag} must be above 0, got {value}")
    return Protocol(**chosen)


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, killed or not.

    An executor's idle workers would otherwise wait for ever, and a busy one would go on writing to
    the folder in which a restart writes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check(flags: argparse.Namespace, protocol: Protocol) -> None:
    """Finds what would stop a run, before any run has begun.

    Raises:
        FileNotFoundError: if there is no data.
        ValueError: if there is too little of it for the tasks, or ``flags.out`` has runs of
            another protocol.
    """
    data = load(flags.data)
    for images in (data.train, data.val, data.test):
        for targets in (protocol.targets, protocol.eval_targets):
            TaskSampler(images, protocol.ways, protocol.shots, targets, protocol.tasks)
    for row in flags.rows:
        for seed in flags.seeds:
            if folder_of(flags, row, seed).exists():
                AblationRun(row, seed, protocol, data, folder_of(flags, row, seed))


def folder_of(flags: argparse.Namespace, row: str, seed: int) -> Path:
    """Returns where a run keeps its files."""
    name = row.replace("++", "plusplus").replace("+", "-").strip("-")
    return flags.out / "runs" / f"{name}-seed{seed}"


def train(row: str, seed: int, flags: argparse.Namespace, protocol: Protocol) -> str:
    """One row with one seed, in a process of its own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the parent decides
    folder = folder_of(flags, row, seed)
    run = AblationRun(row, seed, protocol, load(flags.data), folder, flags.device)
    run.run(60 * flags.checkpoint_minutes)
    return f"{row}, seed {seed}"


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; returns the exit status."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    try:
        protocol = read_protocol(flags)
        flags.rows = flags.rows or protocol.rows()
        check(flags, protocol)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    flags.out.mkdir(parents=True, exist_ok=True)
    lock = (flags.out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however it ends
    except BlockingIOError:
        parser.error(f"another ablation is writing to {flags.out}; wait, or take another --out")
    jobs = list(dict.fromkeys((row, seed) for seed in flags.seeds for row in flags.rows))
    work = partial(train, flags=flags, protocol=protocol)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.jobs, spawn, end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(work, *job) for job in jobs]):
                print(f"finished: {done.result()}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            os._exit(130)  # the processes end with this one; leaving the block would wait for them
        except Exception:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(write_report(flags.out, sys.argv[1:] if arguments is None else arguments))
    lock.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
