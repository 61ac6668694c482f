"""``python -m mamlpp_ext.benchmark package.module:make_model``: MAML against MAML++ on your model.

Times a meta-iteration of plain MAML and of MAML++ in a bare torch loop, in higher and torchopt
where they are installed, and in task_batch_loss, plainly, with rematerialisation and on a GPU as a
CUDA graph, on noise or on a batch of yours. All take turns, so that ratios are of neighbours in
time. Peak memory is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

import mamlpp_ext
from mamlpp_ext.benchmark.loops import BATCHED, LEARNERS, MetaIteration, available_loops
from mamlpp_ext.benchmark.measure import MEGABYTE, Memory, alternate, in_fresh_process, ratio
from mamlpp_ext.benchmark.question import Question, memory_and_time
from mamlpp_ext.check_setup.named import add_batch, read_shape
from mamlpp_ext.checks import checked_count

Contender = tuple[str, str]  # the learner and the loop
_CHILD_SECONDS = 600.0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m mamlpp_ext.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="package.module:name of a model, or of a function that returns one")
    add("--shape", help="of one input of noise, such as 1,28,28")
    add_batch(parser)
    add("--ways", type=int, default=5, help="of noise: classes of a task (%(default)s)")
    add("--shots", type=int, default=1, help="of noise: support examples of a class (%(default)s)")
    add("--targets", type=int, default=1, help="of noise: target examples of a class (%(default)s)")
    add("--tasks", type=int, default=8, help="of noise: tasks of a meta-iteration (%(default)s)")
    add("--steps", type=int, default=5, help="inner steps (%(default)s)")
    add("--first-order", action="store_true", help="no derivatives of the inner gradients")
    add("--chunk-size", type=int, help="tasks that task_batch_loss takes at once (all)")
    add("--channels-last", action="store_true", help="lay model and images out channels_last")
    add("--repeats", type=int, default=7, help="rounds in which all take turns (%(default)s)")
    add("--threads", type=int, help="of torch on the CPU (torch's own choice)")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--json", action="store_true", help="every measured number, instead of the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    try:
        shape = read_shape(flags.shape)
        repeats = checked_count("--repeats", flags.repeats)
        question = Question(
            model=flags.model,
            shape=shape or (),
            ways=flags.ways,
            shots=flags.shots,
            targets=flags.targets,
            steps=flags.steps,
            tasks=flags.tasks,
            second_order=not flags.first_order,
            chunk_size=flags.chunk_size,
            channels_last=flags.channels_last,
            device=flags.device,
            threads=flags.threads,
            batch=flags.batch,
            loss=flags.loss,
        )
        answer = ask(question, repeats)
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        parser.error(_in_flags(error))
    sys.stdout.write((json.dumps(answer, indent=1) if flags.json else table(answer)) + "\n")
    return 0


def ask(question: Question, repeats: int) -> dict[str, Any]:
    """Times all contenders and measures their memory.

    Returns:
        What ``--json`` prints: the question, machine, versions, and for each contender its seconds
        and bytes, or why it refused the model.
    """
    prepared = question.prepare()
    question.check(prepared)
    ready: dict[Contender, MetaIteration] = {}
    refused: dict[Contender, str] = {}
    runnable = available_loops(question.device)
    for contender in [(learner, loop) for loop in runnable for learner in LEARNERS]:
        try:
            iteration = question.iteration(prepared, *contender)
            iteration.gradient()
        except Exception as error:
            if contender[1] == "bare torch":  # no loop can, and the others would only repeat it
                raise
            refused[contender] = _in_flags(error) or type(error).__name__
        else:
            ready[contender] = iteration
    _say(f"timing {len(ready)} loops in {repeats} rounds")
    named = {json.dumps(contender): iteration for contender, iteration in ready.items()}
    seconds = alternate(named, repeats, question.device)
    _say(f"measuring memory in {len(ready)} processes")
    memory = {c: _memory(question, c) for c in ready}
    results = [
        {"learner": c[0], "loop": c[1], "seconds": seconds[json.dumps(c)], **memory[c]}
        for c in ready
    ]
    results += [{"learner": c[0], "loop": c[1], "refused": why} for c, why in refused.items()]
    return {"question": dataclasses.asdict(question), **environment(), "results": results}


def _in_flags(error: Exception) -> str:
    """Returns what an error says, with the flags for the arguments that it names."""
    said = str(error).replace("second_order=False", "--first-order")
    return said.replace("chunk_size=1", "--chunk-size 1")


def _memory(question: Question, contender: Contender) -> dict[str, Any]:
    found: Memory
    found, _ = in_fresh_process(memory_and_time, question, *contender, seconds=_CHILD_SECONDS)
    return {"bytes_before": found.before, "bytes_peak": found.peak}


def environment() -> dict[str, Any]:
    """Returns the machine, the threads, and the versions of what is compared."""
    peers = [loop for loop in available_loops() if loop in ("higher", "torchopt")]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "versions": {
            "mamlpp_ext": mamlpp_ext.__version__,
            **{package: version(package) for package in ("torch", *peers)},
        },
    }


def table(answer: dict[str, Any]) -> str:
    """Returns the answer as a Markdown table, a loop in each line."""
    found = {(r["learner"], r["loop"]): r for r in answer["results"] if "refused" not in r}
    loops = list(dict.fromkeys(loop for _, loop in found))
    plain = [loop for loop in loops if loop not in BATCHED and ("MAML", loop) in found]
    base = min(plain, key=lambda loop: min(found["MAML", loop]["seconds"]))
    question = Question(**answer["question"])
    lines = [
        f"{question}; {question.device}, {answer['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in answer["versions"].items()),
        "",
        f"| loop | MAML, ms | MAML++, ms | MAML++ / MAML | MAML++ / MAML in {base} | MAML, MB "
        "| MAML++, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for loop in loops:
        pair = [found.get((learner, loop)) for learner in LEARNERS]
        ours = pair[1]
        over = [_ratio(ours, pair[0]), _ratio(ours, found["MAML", base])]
        cells = [*map(_best, pair), *over, *map(_megabytes, pair)]
        lines.append(f"| {loop} | {' | '.join(cells)} |")
    lines += [
        "",
        "Times: the best iteration. Ratios: median (quartiles) over rounds. Memory: what two "
        "iterations add to a fresh process (its peak).",
    ]
    lines += [
        f"{r['learner']} in {r['loop']} was refused: {r['refused']}"
        for r in answer["results"]
        if "refused" in r
    ]
    return "\n".join(lines)


def _best(result: dict[str, Any] | None) -> str:
    return f"{1e3 * min(result['seconds']):.1f}" if result else "-"


def _ratio(over: dict[str, Any] | None, under: dict[str, Any] | None) -> str:
    if not (over and under):
        return "-"
    found = ratio(over["seconds"], under["seconds"])
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _megabytes(result: dict[str, Any] | None) -> str:
    if not result:
        return "-"
    added = (result["bytes_peak"] - result["bytes_before"]) / MEGABYTE
    return f"{added:.0f} ({result['bytes_peak'] / MEGABYTE:.0f})"


def _say(what: str) -> None:
    sys.stderr.write(what + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
