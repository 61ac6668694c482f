"""MAML and MAML++ with one to five inner steps: the paper's other table.

    python benchmarks/steps_table.py --data folder          the reduced protocol, see ablation.py
    python benchmarks/steps_table.py --help                 every flag

Each number of inner steps is trained and tested with, for equally many iterations. Plain MAML has
the meta rate that suits it (--tuned-meta-lr). Stopped in any way, the same command goes on where it
was. Results go to --out: table.md, evaluations.jsonl and steps.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import ablation  # first: it finds docs/examples
from ablation_jobs import only_writer, run_all
from ablation_protocol import TUNED, Protocol
from ablation_report import LINES, common_settings, described, heads_of, line_of, origin, over_seeds

Record = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser: the flags of the ablation, where ``--steps`` takes several numbers."""
    parser = ablation.make_parser(__doc__, "ablation/steps")
    parser.set_defaults(rows=None, steps=None)
    parser.add_argument(
        "--inner-steps", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5"
    )
    return parser


def train(steps: int, row: str, seed: int, flags: argparse.Namespace, protocol: Protocol) -> str:
    """One learner with one number of inner steps and one seed, in a process of its own."""
    found = ablation.train(row, seed, folder(flags, steps), flags, replace(protocol, steps=steps))
    return f"{found}, {steps} inner steps"


def folder(flags: argparse.Namespace, steps: int) -> Path:
    """Returns where the runs with so many inner steps are."""
    place: Path = flags.out / f"steps-{steps}"
    return place


def write_report(out: Path, arguments: list[str]) -> str:
    """Writes the table, all records and the picture to ``out``; returns the table."""
    records = [
        json.loads(line)
        for file in sorted(out.glob("steps-*/runs/*/records.jsonl"))
        for line in file.read_text().splitlines()
    ]
    order = list(LINES)
    records.sort(key=lambda r: (order.index(r["row"]), r["settings"]["steps"], r["seed"]))
    (out / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tests = [(number, r) for number, r in enumerate(records, 1) if r["kind"] == "test"]
    text = table(tests, arguments) if tests else "No run has ended yet.\n"
    (out / "table.md").write_text(text)
    if tests:
        draw([r for _, r in tests], out / "steps.png")
    return text


def table(tests: list[tuple[int, Record]], arguments: list[str]) -> str:
    """Returns accuracy by inner steps, what became of the claim, and each run.

    Args:
        tests: each with the line of its record.
        arguments: of the command.
    """
    every = [r for _, r in tests]
    rows, settings = _rows(every), _settings(every)
    rates = {row: next(_rate(r) for r in every if r["row"] == row) for row in rows}
    seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in every}))
    lines = [
        f"{described(settings)}; seeds {seeds}; {settings['test_tasks']} test tasks; backend "
        f"{settings['backend']}. Trained and tested with the same number of inner steps.",
        "",
        "Accuracy in per cent by batch statistics: mean over seeds ± 95 % interval over the tasks "
        "of a run (range over seeds).",
        "",
        *heads_of(["inner steps", *(f"{row}, meta rate {rates[row]:g}" for row in rows)]),
    ]
    for steps in _steps(every):
        found = [_of(every, row, steps) for row in rows]
        lines += [line_of([steps, *(over_seeds(runs) if runs else "" for runs in found)])]
    lines += ["", *claim(every), "", *origin("steps_table.py", arguments, every), ""]
    lines += heads_of(["row", "inner steps", "seed", "accuracy", "running statistics", "record"])
    for number, r in tests:
        cells = [over_seeds([r[name]]) for name in ("batch_statistics", "running_statistics")]
        place = f"evaluations.jsonl, line {number}"
        lines += [line_of([r["row"], r["settings"]["steps"], r["seed"], *cells, place])]
    return "\n".join(lines) + "\n"


def claim(tests: list[Record]) -> list[str]:
    """Returns whether one step of MAML++ is ahead of the most steps of plain MAML."""
    rows, most = _rows(tests), max(_steps(tests))
    one, many = _of(tests, "MAML++", 1), _of(tests, rows[0], most)
    if rows[0] == "MAML++" or not (one and many):
        return []
    lead = 100 * (_mean(one) - _mean(many))
    reach = 100 * sum(statistics.mean(f["interval"] for f in found) for found in (one, many))
    extent = "beyond both intervals" if abs(lead) > reach else "within the intervals"
    place = "ahead of" if lead > 0 else "behind"
    return [
        f"One inner step of MAML++ is {place} {most} of {rows[0]} by {abs(lead):.1f} points, "
        f"{extent}."
    ]


def draw(tests: list[Record], path: Path) -> None:
    """Accuracy over inner steps, a line for each learner, with the intervals and every seed."""
    figure, plot = plt.subplots(figsize=(7, 5), layout="constrained")
    for row in _rows(tests):
        steps = [k for k in _steps(tests) if _of(tests, row, k)]
        found = [_of(tests, row, k) for k in steps]
        means = [100 * _mean(runs) for runs in found]
        reach = [100 * statistics.mean(f["interval"] for f in runs) for runs in found]
        style = {"capsize": 4, "elinewidth": 1, "marker": "o", **LINES[row]}
        plot.errorbar(steps, means, reach, label=row, **style)
        for k, runs in zip(steps, found, strict=True):
            seeds = [100 * f["accuracy"] for f in runs]
            plot.plot([k] * len(seeds), seeds, "x", color=LINES[row]["color"], markersize=5)
    plot.set(
        xlabel="inner steps, in training and test",
        ylabel="test accuracy (%), cross: a seed",
        title=tests[0]["data"],
        xticks=_steps(tests),
    )
    plot.grid(alpha=0.3)
    plot.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(tests: list[Record]) -> list[str]:
    there = {r["row"] for r in tests}
    return [row for row in LINES if row in there]


def _steps(tests: list[Record]) -> list[int]:
    return sorted({r["settings"]["steps"] for r in tests})


def _of(tests: list[Record], row: str, steps: int) -> list[dict[str, float]]:
    return [
        r["batch_statistics"] for r in tests if (r["row"], r["settings"]["steps"]) == (row, steps)
    ]


def _mean(found: list[dict[str, float]]) -> float:
    return statistics.mean(f["accuracy"] for f in found)


def _rate(record: Record) -> float:
    settings = record["settings"]
    rate: float = settings["tuned_meta_lr" if record["row"] == TUNED else "meta_lr"]
    return rate


def _settings(tests: list[Record]) -> dict[str, Any]:
    """Returns what is alike in all but the number of inner steps."""
    return common_settings([{**r, "settings": {**r["settings"], "steps": 0}} for r in tests])


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing and writes the report; returns the exit status."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    with ExitStack() as held:
        try:
            if flags.steps is not None or min(flags.inner_steps) < 1:
                raise ValueError(
                    f"--inner-steps takes the numbers of steps, each at least 1; got --steps "
                    f"{flags.steps}, --inner-steps {flags.inner_steps}"
                )
            data = ablation.read_data(flags)
            protocol = ablation.read_protocol(flags)
            plain = TUNED if TUNED in protocol.rows() else "MAML"
            rows = flags.rows or [plain, "MAML++"]
            jobs = list(
                dict.fromkeys(
                    (steps, row, seed)
                    for seed in flags.seeds
                    for steps in flags.inner_steps
                    for row in rows
                )
            )
            for steps in flags.inner_steps:
                ours = [(row, seed) for k, row, seed in jobs if k == steps]
                folders = [(*job, ablation.folder_of(folder(flags, steps), *job)) for job in ours]
                ablation.check(replace(protocol, steps=steps), data, folders)
            held.enter_context(only_writer(flags.out))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(data.summary(), file=sys.stderr, flush=True)
        run_all(partial(train, flags=flags, protocol=protocol), jobs, flags)
        print(write_report(flags.out, sys.argv[1:] if arguments is None else arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
