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
from contenders import table_of
from mamlpp_ext.benchmark.measure import MEGABYTE, Quartiles, ratio
from speed_picture import Record, draw, megabytes_added
from trainings import KINDS, SCHEDULES

PLAIN, REMAT = "MAML++ in task_batch_loss", "MAML++ in rematerialised"


def write(folder: Path, readme: Path) -> str:
    """Writes the picture beside the records and the table into ``readme``; returns the table."""
    found = json.loads((folder / "speed.json").read_text())
    text = table(found)
    if any(over in r for r in found["records"] for over in ("steps", "tasks")):
        draw(found["records"], folder / "speed.png")
        place = os.path.relpath(folder, readme.parent)
        text += f"\n![Time and memory over inner steps and over tasks]({place}/speed.png)\n"
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
            _memory_rows(memory) if of_process else [],
        ),
        _all_memory(memory, "steps", f"K, {ways}-way, {found['memory_tasks']} tasks", of_process),
        _all_memory(memory, "tasks", f"tasks, {ways}-way, K = 5", of_process),
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
        f"| {best} | {_verdict(found.median, record['goal'])} |"
    )


def _reference_rows(of_kind: dict[str, list[Record]]) -> Iterator[str]:
    """A line for each setting of ours: its time and its memory, by theirs."""
    memory = {r["name"]: r for r in of_kind.get("reference memory", []) if "failed" not in r}
    for record in of_kind.get("reference", []):
        *names, theirs = record["seconds"]
        for name in names:
            times = [record["seconds"][n] for n in (name, theirs)]
            found = ratio(*times)
            peaks, added, verdict = "not measured", "", ""
            if name in memory and theirs in memory:
                pair = memory[name], memory[theirs]
                value = pair[0]["bytes_peak"] / pair[1]["bytes_peak"]
                peaks, verdict = f"{value:.3f}", _met(value, reference.GOALS[1])
                added = " / ".join(f"{megabytes_added(r):.0f}" for r in pair)
            yield (
                f"| {name} | {_spread(found)} "
                f"| {' / '.join(f'{1e3 * min(t):.0f}' for t in times)} | {peaks} | {added} "
                f"| {_met(found.median, reference.GOALS[0])} | {verdict} |"
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
                f"| {_verdict(found.median, schedule.goal)} |"
            )


def _spread(found: Quartiles) -> str:
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"


def _verdict(value: float, goal: float | None) -> str:
    """Two cells: the goal and whether it is met."""
    if goal is None:
        return " | "
    return f"≤ {goal:.3f} | {_met(value, goal)}"


def _met(value: float, goal: float) -> str:
    return "met" if value <= goal else "**missed**"


def _memory_rows(records: list[Record]) -> Iterator[str]:
    by_place = {
        (r["name"], r.get("steps")): r for r in records if "tasks" not in r and "failed" not in r
    }
    wanted = [
        ("rematerialised / plain, K = 20", (REMAT, 20), (PLAIN, 20), 0.30),
        ("rematerialised, K = 50 / K = 5", (REMAT, 50), (REMAT, 5), 1.5),
    ]
    for name, over, under, goal in wanted:
        if over not in by_place or under not in by_place:
            yield f"| {name} | not measured | | | ≤ {goal:.3f} | |"
            continue
        a, b = by_place[over], by_place[under]
        own, other = megabytes_added(a), megabytes_added(b)
        peaks = a["bytes_peak"] / b["bytes_peak"]
        yield (
            f"| {name} | {peaks:.3f} | {own / other:.3f} | {own:.0f} / {other:.0f} "
            f"| {_verdict(peaks, goal)} |"
        )


def _all_memory(records: list[Record], over: str, title: str, peaks: bool) -> list[str]:
    """A line for each contender, a column for each K or T: increase (peak), milliseconds."""
    chosen = [r for r in records if r["kind"] == "memory" and over in r]
    if not chosen:
        return []
    places = sorted({r[over] for r in chosen})
    memory = "MB added (peak)" if peaks else "MB added"
    lines = [
        f"| {memory}, ms; over {title} | {' | '.join(map(str, places))} |",
        "|---" * (len(places) + 1) + "|",
    ]
    for name in dict.fromkeys(r["name"] for r in chosen):
        row = {r[over]: r for r in chosen if r["name"] == name}
        lines.append(f"| {name} | {' | '.join(_cell(row.get(place), peaks) for place in places)} |")
    return lines


def _cell(record: Record | None, peaks: bool = True) -> str:
    if record is None:
        return "-"
    if "failed" in record:
        return "too long" if "not done within" in record["failed"] else "failed"
    peak = f" ({record['bytes_peak'] / MEGABYTE:.0f})" if peaks else ""
    return f"{megabytes_added(record):.0f}{peak}, {1e3 * record['seconds']:.0f}"


if __name__ == "__main__":
    here = Path(__file__).parent
    print(write(here / "results" / "speed", here / "README.md"))
