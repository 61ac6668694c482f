"""The rows of the speed comparison that are about memory."""

from __future__ import annotations

from collections.abc import Iterator

from goals import verdict
from mamlpp_ext.benchmark.measure import MEGABYTE
from speed_picture import Record, megabytes_added

PLAIN, REMAT = "MAML++ in task_batch_loss", "MAML++ in rematerialised"


def memory_rows(records: list[Record]) -> Iterator[str]:
    """Yields a line for each goal of rematerialisation."""
    done = [r for r in records if "steps" in r and "failed" not in r]
    by_place = {(r["name"], r["steps"]): r for r in done}
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
            f"| {verdict(peaks, goal)} |"
        )


def all_memory(records: list[Record], over: str, title: str, peaks: bool) -> list[str]:
    """A line for each contender, a column for each place: increase (peak), milliseconds."""
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
        lines.append(
            f"| {name} | {' | '.join(_amount(row.get(place), peaks) for place in places)} |"
        )
    return lines


def _amount(record: Record | None, peaks: bool = True) -> str:
    if record is None:
        return "-"
    if "failed" in record:
        return "too long" if "not done within" in record["failed"] else "failed"
    peak = f" ({record['bytes_peak'] / MEGABYTE:.0f})" if peaks else ""
    return f"{megabytes_added(record):.0f}{peak}, {1e3 * record['seconds']:.0f}"
