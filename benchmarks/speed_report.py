"""The table and picture of the speed comparison, from its records.

python benchmarks/speed_report.py           writes both again, without measuring
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import reference
from contenders import OVER, table_of
from goals import met, verdict
from mamlpp_ext.benchmark.measure import Quartiles, ratio
from speed_memory import all_memory, memory_rows
from speed_picture import Record, draw, megabytes_added
from trainings import KINDS, SCHEDULES


def write(folder: Path, readme: Path) -> str:
    """Writes the picture beside the records and the table into ``readme``; returns the table."""
    found = json.loads((folder / "speed.json").read_text())
    text = table(found)
    if any(over in r for r in found["records"] for over in OVER):
        draw(found["records"], folder / "speed.png")
        place = os.path.relpath(folder, readme.parent)
        text += f"\n![Time and memory over steps, tasks and sizes]({place}/speed.png)\n"
    first, last = markers(found["device"])
    before, begin, rest = readme.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{readme} lacks the markers {first} and {last}; put them where it goes")
    readme.write_text(f"{before}{first}\n{text}{last}{after}")
    return text


def markers(device: str) -> tuple[str, str]:
    """Returns the lines between which a device's table goes."""
    name = table_of(device)
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def table(found: dict[str, Any]) -> str:
    """Returns the ratios with their goals, and the measured memory."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    of_kind: dict[str, list[Record]] = {}
    for record in found["records"]:
        of_kind.setdefault(record["kind"], []).append(record)
    ways, memory = found["memory_ways"], of_kind.get("memory", [])
    # A peak is a process's own, which measurements on a GPU share.
    of_process = found["device"] == "cpu"
    parts = [
        [
            f"Command: `{found['command']}` ({found['minutes']:.1f} minutes). "
            f"{found['processor']}, {found['threads']} threads, Python {found['python']}, "
            f"{versions}; seed {found['seed']}."
        ],
        _rows(
            "time | ratio: median (quartiles) | best, ms | goal | ",
            map(_time_row, of_kind.get("time", [])),
        ),
        _cells(of_kind.get("cell", [])),
        _rows(
            "whole iteration with MSL, 5-way, second order / the authors' code "
            "| time: median (quartiles) | best, ms | peak memory | MB added | "
            f"time ≤ {reference.GOALS[0]:.3f} | memory ≤ {reference.GOALS[1]:.3f}",
            _reference_rows(of_kind),
        ),
        _rows(
            "layout, in bare torch | MAML | MAML++ | MAML, channels_last | MAML++, channels_last "
            "| each at its faster, MAML++ / MAML",
            map(_layout_row, of_kind.get("layouts", [])),
        ),
        _rows(
            "a whole training by MAML++ / by MAML in second order | "
            f"{' | '.join(KINDS)} | schedule | ratio: median (quartiles) | goal | ",
            _schedule_rows(of_kind.get("schedules", [])),
        ),
        _rows(
            "an iteration, 5-way, second order, 8 tasks | launches | kernels | they run, ms",
            map(_launches_row, of_kind.get("launches", [])),
        ),
        _rows(
            "peak memory | ratio of peaks | ratio of increases | increases, MB | goal | ",
            memory_rows(memory) if of_process else [],
        ),
        all_memory(memory, "steps", f"K, {ways}-way, {found['memory_tasks']} tasks", of_process),
        all_memory(memory, "tasks", f"tasks, {ways}-way, K = 5", of_process),
        all_memory(memory, "filters", "filters of Conv4, 5-way, K = 5", of_process),
        all_memory(memory, "parameters", "parameters of an MLP, 5-way, K = 5", of_process),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _rows(title: str, rows: Iterable[str]) -> list[str]:
    """Returns a table, or nothing where there are no rows."""
    found = list(rows)
    return [f"| {title} |", "|---" * (title.count("|") + 1) + "|", *found] if found else []


def fastest(record: Record) -> tuple[str, str]:
    """Returns the contender on top of the ratio, and the fastest of those below."""
    over, *under = record["seconds"]
    return over, min(under, key=lambda name: statistics.median(record["seconds"][name]))


def _time_row(record: Record) -> str:
    over, under = fastest(record)
    seconds = record["seconds"]
    found = ratio(seconds[over], seconds[under])
    best = f"{1e3 * min(seconds[over]):.0f} / {1e3 * min(seconds[under]):.0f}"
    chosen = f" ({under})" if len(seconds) > 2 else ""
    return (
        f"| {record['name']}{chosen} | {_spread(found)} "
        f"| {best} | {verdict(found.median, record['goal'])} |"
    )


def _cells(records: list[Record]) -> list[str]:
    """A row for each network and order, a column for each loop; what misses its goal is bold."""
    loops = list(dict.fromkeys(r["loop"] for r in records))
    lines = []
    for name in dict.fromkeys(r["name"] for r in records):
        of_loop = {r["loop"]: r for r in records if r["name"] == name}
        goal = next(iter(of_loop.values()))["goal"]
        cells = [_cell(of_loop[loop]) if loop in of_loop else "-" for loop in loops]
        lines.append(f"| {name} | {'' if goal is None else f'{goal:.2f}'} | {' | '.join(cells)} |")
    return _rows(f"MAML++ / MAML: median (quartiles), best | ≤ | {' | '.join(loops)}", lines)


def _cell(record: Record) -> str:
    over, under = record["seconds"].values()
    found, goal = ratio(over, under), record["goal"]
    text = _spread(found)
    if goal is not None and found.median > goal:
        text = f"**{text}**"
    return f"{text}, {_milliseconds(over)} / {_milliseconds(under)} ms"


def _milliseconds(seconds: list[float]) -> str:
    best = 1e3 * min(seconds)
    return f"{best:.1f}" if best < 100 else f"{best:.0f}"


def _reference_rows(of_kind: dict[str, list[Record]]) -> Iterator[str]:
    """A line for each setting of ours: its time and its memory, by theirs."""
    memory = {r["name"]: r for r in of_kind.get("reference memory", []) if "failed" not in r}
    for record in of_kind.get("reference", []):
        *names, theirs = record["seconds"]
        for name in names:
            times = [record["seconds"][n] for n in (name, theirs)]
            found = ratio(*times)
            peaks, added, memory_met = "not measured", "", ""
            if name in memory and theirs in memory:
                pair = memory[name], memory[theirs]
                value = pair[0]["bytes_peak"] / pair[1]["bytes_peak"]
                peaks, memory_met = f"{value:.3f}", met(value, reference.GOALS[1])
                added = " / ".join(f"{megabytes_added(r):.0f}" for r in pair)
            yield (
                f"| {name} | {_spread(found)} "
                f"| {' / '.join(f'{1e3 * min(t):.0f}' for t in times)} | {peaks} | {added} "
                f"| {met(found.median, reference.GOALS[0])} | {memory_met} |"
            )


def _launches_row(record: Record) -> str:
    return (
        f"| {record['name']} | {record['launches']} | {record['kernels']} "
        f"| {1e3 * record['kernel_seconds']:.1f} |"
    )


def _layout_row(record: Record) -> str:
    """Every learner's time as a share of MAML's in torch's default layout."""
    seconds = record["seconds"]
    shares = [ratio(seconds[name], seconds["MAML"]).median for name in seconds]
    fast = [
        min(names, key=lambda name: statistics.median(seconds[name]))
        for names in (("MAML++", "MAML++, channels_last"), ("MAML", "MAML, channels_last"))
    ]
    best = ratio(*(seconds[name] for name in fast))
    cells = " | ".join(f"{share:.3f}" for share in shares)
    return f"| {record['name']} | {cells} | {_spread(best)} |"


def _schedule_rows(records: list[Record]) -> Iterator[str]:
    """Every kind of iteration by MAML's, and a training that has each for its share."""
    for record in records:
        seconds = record["seconds"]
        kinds = " | ".join(f"{ratio(seconds[k], seconds['MAML']).median:.3f}" for k in KINDS)
        for schedule in SCHEDULES:
            found = ratio(schedule.seconds(seconds), seconds["MAML"])
            yield (
                f"| {record['name']} | {kinds} | {schedule.name} | {_spread(found)} "
                f"| {verdict(found.median, schedule.goal)} |"
            )


def _spread(found: Quartiles) -> str:
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"


if __name__ == "__main__":
    here = Path(__file__).parent
    print(write(here / "results" / "speed", here / "README.md"))
