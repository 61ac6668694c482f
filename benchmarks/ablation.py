"""The paper's ablation: MAML, each part of MAML++ alone, and all together.

    make ablation DATA=omniglot28.npz          the reduced protocol, which two cores finish
    make ablation DATA=folder                  on images of your own: another reduced protocol
    python benchmarks/ablation.py --help       every flag
    python benchmarks/ablation.py --data omniglot28.npz --preset paper-omniglot-20way-1shot

Stopped in any way, the same command goes on where it was. A preset sets what no flag says. Results
go to --out: table.md, evaluations.jsonl (a record for every evaluation), pictures of accuracy over
iterations and of what the last row learned; TensorBoard scalars too, if its package is installed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

# The data, the network and the learner are those of the demonstration.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "examples"))

import torch

from ablation_jobs import only_writer, run_all
from ablation_protocol import PRESETS, ROWS, Protocol
from ablation_report import write_report
from ablation_run import AblationRun
from demo import DATA_HELP, add_image_flags, cores
from few_shot import FewShotData, TaskSampler, load
from learners import BACKENDS
from networks import NETWORKS

CHOICES = {"backend": list(BACKENDS), "network": NETWORKS}


def make_parser(text: str | None = __doc__, out: str = "ablation") -> argparse.ArgumentParser:
    """Returns the parser: a flag for every field of :class:`Protocol`, and some for the run.

    Args:
        text: what the program is for.
        out: the folder for results, if no flag names one.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help=DATA_HELP)
    add_image_flags(parser)
    add("--preset", choices=PRESETS, help="default: reduced, or cifar-fs-reduced for your images")
    add("--rows", nargs="+", choices=ROWS, help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    add("--out", type=Path, default=Path(out), help="folder (default: %(default)s)")
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
        if field.name not in ("size", "flip"):  # added already, as in the demonstration
            kind = {"str": str, "int": int}.get(str(field.type), float)
            add(
                f"--{field.name.replace('_', '-')}",
                type=kind,
                choices=CHOICES.get(field.name),
                help=f"{field.metadata['help']} (reduced: {field.default})",
            )
    return parser


def given(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of :class:`Protocol` for which there was a flag.

    Raises:
        ValueError: if a number is not above 0.
    """
    found = {field.name: getattr(flags, field.name) for field in fields(Protocol)}
    found = {name: value for name, value in found.items() if value is not None}
    for name, value in found.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("multi_step_loss", "first_order", "ensemble"):
            if value < 0:
                unit = "models" if name == "ensemble" else "epochs"
                raise ValueError(f"{flag} must be at least 0 ({unit}), got {value}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{flag} must be above 0, got {value}")
    return found


def read_protocol(flags: argparse.Namespace) -> Protocol:
    """Returns the preset with the flags that were given.

    Raises:
        ValueError: if a number is not above 0.
    """
    return Protocol(**{**asdict(PRESETS[flags.preset]), **given(flags)})


def read_data(flags: argparse.Namespace) -> FewShotData:
    """Returns the data, and notes the preset and the file that the runs take.

    Raises:
        OSError: if there is no data.
        ValueError: if it is no such data, or a flag is wrong.
    """
    size = given(flags).get("size", flags.preset and PRESETS[flags.preset].size)
    data = load(flags.data, size, flags.cache)
    flags.preset = flags.preset or ("cifar-fs-reduced" if data.name == "images" else "reduced")
    flags.data = data.source  # decoded once, not by every run
    return data


def check(protocol: Protocol, data: FewShotData, folders: Iterable[tuple[str, int, Path]]) -> None:
    """Finds what would stop a run, before any run has begun.

    Args:
        protocol: of the runs.
        data: what was read.
        folders: row, seed and folder of each run.

    Raises:
        ValueError: if there is too little data for the tasks, or a folder has a run of another
            protocol.
    """
    p = protocol
    for images in (data.train, data.val, data.test):
        for targets in (p.targets, p.eval_targets):
            flip = p.flip and images is data.train
            TaskSampler(images, p.ways, p.shots, targets, p.tasks, flip=flip)
    for row, seed, folder in folders:
        if folder.exists():
            AblationRun(row, seed, protocol, data, folder)


def folder_of(out: Path, row: str, seed: int) -> Path:
    """Returns where a run keeps its files."""
    name = row.replace("++", "plusplus").replace("+", "-").strip("-")
    return out / "runs" / f"{name}-seed{seed}"


def train(row: str, seed: int, out: Path, flags: argparse.Namespace, protocol: Protocol) -> str:
    """One row with one seed, in a process of its own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the parent decides
    data = load(flags.data)
    run = AblationRun(row, seed, protocol, data, folder_of(out, row, seed), flags.device)
    run.run(60 * flags.checkpoint_minutes)
    return f"{row}, seed {seed}"


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; returns the exit status."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with ExitStack() as held:
        try:
            data = read_data(flags)
            protocol = read_protocol(flags)
            rows = flags.rows or protocol.rows()
            jobs = list(dict.fromkeys((row, seed) for seed in flags.seeds for row in rows))
            check(protocol, data, [(*job, folder_of(flags.out, *job)) for job in jobs])
            held.enter_context(only_writer(flags.out))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(data.summary(), file=sys.stderr, flush=True)
        run_all(partial(train, out=flags.out, flags=flags, protocol=protocol), jobs, flags)
        print(write_report(flags.out, sys.argv[1:] if arguments is None else arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
