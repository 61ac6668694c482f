"""A soak: MAML++ on Omniglot, killed again and again, has to end as if nothing had happened.

    python benchmarks/soak.py --data omniglot28.npz                           an hour, six kills
    python benchmarks/soak.py --data omniglot28.npz --minutes 1 --kills 2

Starts ablation.py, ends it and its worker with SIGKILL at random moments, starts it again, and then
says whether any validation is missing, repeated or changed, and whether the worker's memory grew
between one minute after its last start and its end. Writes soak.json and soak.png to --out; fails
if a check does. Further flags go to ablation.py (--filters 64). Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

SCRIPT = Path(__file__).with_name("ablation.py")
GROWTH = 0.03  # of resident memory, that is still no growth
EPOCHS = 20  # a validation after each
KILLED_WITHIN = 0.75  # of the training, so that the last stretch is long
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Soaks; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="omniglot28.npz, or a folder of Omniglot's PNGs")
    add("--minutes", type=float, default=60.0, help="of training (%(default)s)")
    add("--kills", type=int, default=6, help="how often it is killed (%(default)s)")
    add("--seed", type=int, default=0, help="of the moments (%(default)s)")
    add("--out", type=Path, default=Path("ablation/soak"), help="folder (%(default)s)")
    flags, others = parser.parse_known_args(arguments)
    if (flags.out / "runs").exists():
        parser.error(f"{flags.out} has a soak already; remove it or take another --out")
    flags.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), *ablation_flags(flags), *others]
    moments = random.Random(flags.seed)
    stretches: list[Record] = []
    for number in range(flags.kills + 1):
        patience = KILLED_WITHIN * 60 * flags.minutes / max(flags.kills, 1)
        limit = moments.uniform(0.2, 1) * patience if number < flags.kills else None
        stretches.append(stretch(command, limit, flags.out))
        print(f"stretch {number}: {stretches[-1]['iterations']} iterations", file=sys.stderr)
    report = {
        "command": f"python benchmarks/soak.py {shlex.join(sys.argv[1:])}",
        **findings(stretches, settle=min(60.0, 60 * flags.minutes / 10)),
        "stretches": stretches,
    }
    draw(report, flags.out / "soak.png")
    for part in stretches:  # the picture has shown them all
        part["memory_mb"] = part["memory_mb"][:: max(len(part["memory_mb"]) // 20, 1)]
    (flags.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["checks"], indent=1))
    return 0 if all(report["checks"].values()) else 1


def ablation_flags(flags: argparse.Namespace) -> list[str]:
    """Returns the flags of ablation.py: schedules in proportion, a checkpoint every 60th."""
    settings = {
        "data": flags.data,
        "out": flags.out,
        "rows": "MAML++",
        "seeds": 0,
        "jobs": 1,
        "minutes": flags.minutes,
        "checkpoint-minutes": flags.minutes / 60,
        "epochs": EPOCHS,
        "val-every": 1,
        "first-order": EPOCHS // 10,
        "multi-step-loss": EPOCHS // 10,
        "test-tasks": 100,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def stretch(command: list[str], limit: float | None, out: Path) -> Record:
    """Runs from one start to its kill after ``limit`` seconds, or to the end.

    Returns:
        What the checkpoint holds afterwards, and the worker's resident memory second by second.
    """
    began = time.monotonic()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    memory: list[tuple[float, float]] = []
    try:
        while run.poll() is None and (limit is None or time.monotonic() - began < limit):
            time.sleep(1)
            if resident := worker_memory(run.pid):
                memory.append((round(time.monotonic() - began, 1), resident))
    finally:
        killed = run.poll() is None
        if killed:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    if not killed and run.returncode:
        raise RuntimeError(f"ablation.py ended by itself with status {run.returncode}")
    at, records = {"total": 0, "seconds": 0.0}, []
    for file in out.glob("runs/*/checkpoint.pt"):
        state = torch.load(file, weights_only=True)
        at, records = state["position"], state["records"]
    return {
        "killed": killed,
        "wall_seconds": round(time.monotonic() - began, 1),
        "iterations": at["total"],
        "training_seconds": round(at["seconds"], 1),
        "records": records,
        "memory_mb": memory,
    }


def worker_memory(parent: int) -> float | None:
    """Returns the resident memory of the largest child in MB (the other one counts resources)."""
    found = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
            found.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))
    return max(found, default=None)


def findings(stretches: list[Record], settle: float) -> Record:
    """Returns what the stretches show, by name, and whether each check holds.

    Args:
        stretches: from :func:`stretch`, in order.
        settle: seconds after the last start from which memory is compared.
    """
    records = stretches[-1].pop("records")
    before = [part.pop("records") for part in stretches[:-1]]
    curve = [r for r in records if r["kind"] == "validation"]
    iterations = [r["iterations"] for r in curve]
    seen = [part["iterations"] for part in stretches]
    first, last = memory_levels(stretches[-1]["memory_mb"], settle)
    return {
        "checks": {
            "every epoch validated once": [r["epoch"] for r in curve] == [*range(1, EPOCHS + 1)],
            "iterations increase": all(a < b for a, b in pairwise(iterations)),
            "no kill lost a record": all(records[: len(part)] == part for part in before),
            "no start fell behind": all(a <= b for a, b in pairwise(seen)),
            "tested at the end": records[-1]["kind"] == "test",
            "memory did not grow": last <= first * (1 + GROWTH),
        },
        "memory_mb_at_start_and_end": [first, last],
        "test": {name: records[-1][name] for name in ("batch_statistics", "running_statistics")},
        **{name: records[-1][name] for name in ("machine", "versions", "settings")},
        "curve": [
            {name: r[name] for name in ("epoch", "iterations", "seconds", "loss")}
            | {"accuracy": r["batch_statistics"]["accuracy"]}
            for r in curve
        ],
    }


def memory_levels(samples: list[tuple[float, float]], settle: float) -> tuple[float, float]:
    """Returns the 95th percentiles of the first and of the last fifth of what follows ``settle``.

    Memory goes up and down within each iteration, and down in the test at the end: what grows is
    the level that it comes back to.
    """
    memory = [mb for second, mb in samples if second >= settle]
    fifth = max(len(memory) // 5, 1)
    first, last = (round(float(np.percentile(m, 95)), 1) for m in (memory[:fifth], memory[-fifth:]))
    return first, last


def draw(report: Record, path: Path) -> None:
    """Validation accuracy over training time, memory over wall time, a line at each kill."""
    figure, (curve, memory) = plt.subplots(2, 1, figsize=(9, 6), layout="constrained")
    minutes = [point["seconds"] / 60 for point in report["curve"]]
    curve.plot(minutes, [100 * point["accuracy"] for point in report["curve"]], marker=".")
    curve.set(xlabel="minutes of training", ylabel="validation accuracy (%)")
    wall = 0.0
    for part in report["stretches"]:
        points = [((wall + second) / 60, mb) for second, mb in part["memory_mb"]]
        memory.plot(*np.array(points).reshape(-1, 2).T, color="tab:blue")  # killed early: none
        wall += part["wall_seconds"]
        if part["killed"]:
            curve.axvline(part["training_seconds"] / 60, color="tab:red", linestyle=":")
            memory.axvline(wall / 60, color="tab:red", linestyle=":")
    memory.set(xlabel="minutes by the clock", ylabel="resident memory (MB)", ylim=(0, None))
    for plot in (curve, memory):
        plot.plot([], [], color="tab:red", linestyle=":", label="SIGKILL")
        plot.grid(alpha=0.3)
        plot.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
