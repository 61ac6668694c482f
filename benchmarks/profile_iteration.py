"""Where the time of a meta-iteration goes: milliseconds a task in each kind of operation.

    python benchmarks/profile_iteration.py --ways 5 --first-order
    python benchmarks/profile_iteration.py --reference checkout    # ours beside the authors' code

Prints a table for benchmarks/README.md. Times are the profiler's of the calling thread, which waits
for the others; what is left of the wall clock is Python, the profiler's cost included. The last
column is what the tensors that one iteration makes hold at once, at the most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

import reference
from mamlpp_ext.benchmark.measure import MEGABYTE, keep_memory
from problems import PROBLEMS

Run = Callable[[], object]

# The first kind that has a part of an operation's name; all others are the last kind.
KINDS = {
    "convolutions": ("conv", "Conv"),
    "max pooling": ("max_pool", "MaxPool", "gather"),
    "batch norm": ("batch_norm", "BatchNorm"),
    "ReLU": ("relu", "Relu", "threshold", "Threshold", "clamp_min"),
    "other operations": ("",),
}
CONTENDERS = [
    (learner, loop) for loop in ("higher", "torchopt") for learner in ("MAML", "MAML++")
] + [("MAML++", "task_batch_loss"), ("MAML++", "rematerialised")]


def shares(iteration: Run, repeats: int) -> dict[str, float]:
    """Returns the seconds of one iteration by kind of operation."""
    for _ in range(2):
        iteration()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        for _ in range(repeats):
            iteration()
        wall = time.perf_counter() - start
    found = dict.fromkeys(KINDS, 0.0)
    for event in seen.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(p in event.key for p in parts))
        found[kind] += event.self_cpu_time_total / 1e6
    found["Python"] = wall - sum(found.values())
    return {kind: seconds / repeats for kind, seconds in {**found, "all": wall}.items()}


def bytes_at_once(iteration: Run) -> int:
    """Returns how much one iteration holds in tensors of its own, at the most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        iteration()
    results: Any = seen.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ways", type=int, choices=(5, 20), default=5, help="of the tasks (%(default)s)")
    add("--first-order", action="store_true", help="no derivatives of the inner gradients")
    add("--channels-last", action="store_true", help="the layout of model and images")
    add("--steps", type=int, default=5, help="inner steps (%(default)s)")
    add("--tasks", type=int, default=8, help="of an iteration (%(default)s)")
    add("--threads", type=int, default=2, help="of torch (%(default)s)")
    add("--repeats", type=int, default=5, help="iterations of each (%(default)s)")
    add("--reference", type=Path, help="checkout of AntreasAntoniou/HowToTrainYourMAMLPytorch")
    flags = parser.parse_args(arguments)
    keep_memory()
    tasks = reference.QUESTION.tasks if flags.reference else flags.tasks
    print("| ms a task | " + " | ".join((*KINDS, "Python", "all", "tensors, MB")) + " |")
    print("|---" * (len(KINDS) + 4) + "|")
    for name, iteration in contenders(flags):
        found = shares(iteration, flags.repeats)
        cells = [f"{1e3 * seconds / tasks:.1f}" for seconds in found.values()]
        cells.append(f"{bytes_at_once(iteration) / MEGABYTE:.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


def contenders(flags: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """Yields what is profiled, by name."""
    if flags.reference:
        for name in (*reference.OURS, reference.THEIRS):
            yield name, reference.contender(name, flags.reference, flags.threads)
        return
    question = replace(
        PROBLEMS[f"Conv4-64 {flags.ways}-way"],
        second_order=not flags.first_order,
        channels_last=flags.channels_last,
        steps=flags.steps,
        tasks=flags.tasks,
        threads=flags.threads,
    )
    prepared = question.prepare()
    for contender in CONTENDERS:
        yield " in ".join(contender), question.iteration(prepared, *contender)


if __name__ == "__main__":
    main()
