"""Speed and memory of MAML++ against MAML: the ratios, as alternating pairs, and the memory.

    make bench                                  all of it, in some forty minutes on two idle cores
    make bench REFERENCE=checkout               with the authors' public code too
    python benchmarks/compare.py --help         every flag

Writes speed.json (every measured number) and speed.png to --out, and the table between the markers
in --readme. The contenders of a ratio run in turn, A B A B, in one process, and the ratio is taken
within each round; peak memory is measured in a fresh process for every number (on a GPU in one).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import reference
from contenders import (
    BATCH,
    GRAPH,
    OVER,
    PEERS,
    TRAINED_BY,
    Cell,
    Pair,
    cells,
    memory_questions,
    pairs,
    table_of,
)
from launches import launches
from mamlpp_ext.benchmark.__main__ import environment
from mamlpp_ext.benchmark.measure import alternate, in_fresh_process, in_this_process
from mamlpp_ext.benchmark.question import Question, memory_and_time
from problems import PROBLEMS
from trainings import KINDS

HERE = Path(__file__).parent


def layouts(name: str, question: Question, rounds: int) -> dict[str, Any]:
    """Returns the record of both learners in both layouts, in a bare loop."""
    runs = {}
    for channels_last in (False, True):
        asked = replace(question, channels_last=channels_last)
        prepared = asked.prepare()
        for learner in ("MAML", "MAML++"):
            about = f"{learner}, channels_last" if channels_last else learner
            runs[about] = asked.iteration(prepared, learner, "bare torch")
    seconds = alternate(runs, rounds, question.device)
    return {"kind": "layouts", "name": name, "seconds": seconds}


def time_pair(pair: Pair, rounds: int) -> dict[str, Any]:
    """Returns the record of a ratio: every contender's seconds in every round."""
    prepared = pair.question.prepare()
    runs = {
        " in ".join(contender): pair.question.iteration(prepared, *contender)
        for contender in (pair.over, *pair.under)
    }
    seconds = alternate(runs, rounds, pair.question.device)
    return {"kind": "time", "name": pair.name, "goal": pair.goal, "seconds": seconds}


def time_cell(cell: Cell, rounds: int, on: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a network, loop and order."""
    pair = cell.pair()
    pair = replace(pair, question=replace(pair.question, **on))
    goal = cell.goal if on["device"] == "cpu" else None
    seconds = time_pair(pair, cell.rounds(rounds))["seconds"]
    return {"kind": "cell", "name": cell.row, "loop": cell.loop, "goal": goal, "seconds": seconds}


def time_schedules(ways: int, loop: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of MAML and of each kind of iteration in a training by MAML++."""
    fixed = {"device": flags.device, "threads": flags.threads}
    problem = replace(PROBLEMS[f"Conv4-64 {ways}-way"], tasks=2, **fixed)
    prepared = problem.prepare()
    runs = {"MAML": problem.iteration(prepared, "MAML", loop)}
    for kind, (second_order, multi_step) in KINDS.items():
        asked = replace(problem, second_order=second_order, multi_step=multi_step)
        runs[kind] = asked.iteration(prepared, "MAML++", loop)
    seconds = alternate(runs, flags.rounds, flags.device)
    return {"kind": "schedules", "name": f"{loop}, {ways}-way", "seconds": seconds}


def time_reference(checkout: Path, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Yields the records of our iterations against the authors' code, from one run."""
    names = (*reference.OURS, reference.THEIRS)
    runs = {name: reference.contender(name, checkout, threads) for name in names}
    first = {name: run() for name, run in runs.items()}
    # In another order of adding float32 rounds otherwise: 3e-4 after five steps, where float64 has
    # 5e-15. On a GPU convolutions are in TF32: 3e-3.
    apart = 1e-3 if reference.device() == "cpu" else 1e-2
    if max(first.values()) - min(first.values()) > apart:
        raise RuntimeError(
            f"the first losses differ, {first}, so that the iterations do not compute the same; "
            f"the comparison was made with commit {reference.COMMIT} of the authors' code"
        )
    seconds = alternate(runs, rounds, reference.device())
    yield {"kind": "reference", "name": "time", "seconds": seconds, "first_losses": first}


def memory_record(
    name: str,
    function: Any,
    *arguments: Any,
    over: dict[str, int],
    seconds: float,
    device: str = "cpu",
) -> dict[str, Any]:
    """Returns the record of one process: bytes, and the seconds of a warm iteration."""
    record = {"kind": "memory", "name": name, **over}
    call = partial(in_fresh_process, seconds=seconds)
    if device != "cpu":  # there the tensors alone count, whatever else the process has done
        call = in_this_process
    try:
        memory, took = call(function, *arguments)
    except (TimeoutError, RuntimeError) as error:
        return {**record, "failed": str(error)}
    return {**record, "bytes_before": memory.before, "bytes_peak": memory.peak, "seconds": took}


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=int, default=2, help="of torch (%(default)s)")
    add("--rounds", type=int, default=7, help="in which the contenders take turns (%(default)s)")
    add("--reference", type=Path, help="checkout of AntreasAntoniou/HowToTrainYourMAMLPytorch")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--only", choices=("times", "memory", "reference"), help="a part alone (default: all)")
    add("--memory-ways", type=int, choices=(5, 20), default=5, help="of memory (%(default)s)")
    add("--memory-tasks", type=int, default=4, help="tasks for memory over K (%(default)s)")
    add("--limit", type=float, default=60.0, help="seconds for a number of memory (%(default)s)")
    add("--out", type=Path, help="folder (results/speed, for a GPU results/speed-gpu)")
    add("--readme", type=Path, default=HERE / "README.md", help="where the table goes")
    return parser


def measure(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a record for every measurement that the flags ask for."""
    fixed = {"device": flags.device, "threads": flags.threads}
    if flags.only in (None, "times"):
        for pair in pairs(flags.device):
            question = replace(pair.question, **fixed)
            yield time_pair(replace(pair, question=question), flags.rounds)
        for cell in cells():
            if cell.loop == "bare torch" and "Conv4" in cell.network:
                question = replace(cell.pair().question, **fixed)
                yield layouts(cell.row, question, flags.rounds)
        for ways in (5, 20):
            for loop in TRAINED_BY:
                yield time_schedules(ways, loop, flags)
        for cell in cells():
            yield time_cell(cell, flags.rounds, fixed)
        for contender in (*PEERS, BATCH, GRAPH) if flags.device != "cpu" else ():
            question = replace(PROBLEMS["Conv4-64 5-way"], **fixed)
            iteration = question.iteration(question.prepare(), *contender)
            yield {"kind": "launches", "name": " in ".join(contender), **launches(iteration)}
    if flags.reference and flags.only in (None, "reference"):
        yield from time_reference(flags.reference, flags.rounds, flags.threads)
        run = partial(memory_record, over={}, seconds=flags.limit)
        for name in (*reference.OURS, reference.THEIRS):
            where = (name, flags.reference, flags.threads)
            yield {**run(name, reference.memory_and_time, *where), "kind": "reference memory"}
    if flags.only in (None, "memory"):
        for name, question, contender, over in memory_questions(
            flags.device, flags.memory_ways, flags.memory_tasks
        ):
            there = replace(question, **fixed)
            run = partial(memory_record, over=over, seconds=flags.limit, device=flags.device)
            yield run(name, memory_and_time, there, *contender)


def processor(device: str) -> str:
    """Returns the name of the processor, or of the GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command(flags: argparse.Namespace) -> str:
    """Returns the command of this run, without the folders of this machine."""
    given = vars(flags)
    plain = vars(make_parser().parse_args([]))
    words = ["python", "benchmarks/compare.py"]
    for name, value in given.items():
        if value != plain[name] and name not in ("out", "readme"):
            words += [f"--{name.replace('_', '-')}", "PATH" if name == "reference" else str(value)]
    return shlex.join(words)


def main(arguments: list[str] | None = None) -> None:
    flags = make_parser().parse_args(arguments)
    flags.out = flags.out or HERE / "results" / table_of(flags.device)
    flags.out.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command(flags),
        **environment(),
        "device": flags.device,
        "processor": processor(flags.device),
        "threads": flags.threads,
        "seed": Question.seed,
        "problems": {name: asdict(question) for name, question in PROBLEMS.items()},
        "memory_ways": flags.memory_ways,
        "memory_tasks": flags.memory_tasks,
    }
    start, records = time.monotonic(), []
    for record in measure(flags):
        records.append(record)
        place = "".join(f", {k} = {record[k]}" for k in (*OVER, "loop") if k in record)
        name = record["name"] + place
        print(f"{time.monotonic() - start:5.0f} s  {name}", file=sys.stderr, flush=True)
        everything = {**about, "minutes": (time.monotonic() - start) / 60, "records": records}
        (flags.out / "speed.json").write_text(json.dumps(everything, indent=1) + "\n")
    import speed_report  # not before: its matplotlib would count in the memory of the children

    print(speed_report.write(flags.out, flags.readme))


if __name__ == "__main__":
    main()
