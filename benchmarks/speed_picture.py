"""The picture of the speed comparison: time and memory over steps, tasks, filters, parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from contenders import OVER
from mamlpp_ext.benchmark.measure import MEGABYTE

Record = dict[str, Any]
LABELS = {
    "steps": "inner steps",
    "tasks": "tasks",
    "filters": "filters of Conv4",
    "parameters": "parameters of an MLP",
}


def megabytes_added(record: Record) -> float:
    """Returns the megabytes that iterations added."""
    return float(record["bytes_peak"] - record["bytes_before"]) / MEGABYTE


def slope(places: Sequence[float], values: Sequence[float]) -> float | None:
    """Returns the exponent by which values grew between the last two places; None of fewer."""
    if len(values) < 2 or min(values[-2:]) <= 0:
        return None
    return math.log(values[-1] / values[-2]) / math.log(places[-1] / places[-2])


def draw(records: list[Record], path: Path) -> None:
    """Draws time and memory over all that was asked, with the slopes at the upper ends."""
    overs = [over for over in OVER if any(over in r and "failed" not in r for r in records)]
    figure, panels = plt.subplots(
        2, len(overs), figsize=(5 * len(overs), 8), layout="constrained", squeeze=False
    )
    for column, over in enumerate(overs):
        chosen = [r for r in records if over in r and "failed" not in r]
        for name in dict.fromkeys(r["name"] for r in chosen):
            rows = sorted((r for r in chosen if r["name"] == name), key=lambda r: r[over])
            places = [r[over] for r in rows]
            for panel, values in (
                (panels[0][column], [r["seconds"] for r in rows]),
                (panels[1][column], [megabytes_added(r) for r in rows]),
            ):
                steep = slope(places, values)
                label = name if steep is None else f"{name}: {steep:.2f}"
                panel.plot(places, values, marker="o", markersize=3, label=label)
        panels[0][column].set(ylabel="seconds a meta-iteration", xlabel=LABELS[over])
        panels[1][column].set(ylabel="memory added, MB", xlabel=LABELS[over])
        for panel in panels[:, column]:
            _finish(panel, sorted({r[over] for r in chosen}))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _finish(panel: Any, places: list[int]) -> None:
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(places, [f"{place:.3g}" if place > 999 else str(place) for place in places])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, title="slope at the upper end", title_fontsize=7)
