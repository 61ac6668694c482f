"""The picture of the speed comparison: time and memory over inner steps and over tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from mamlpp_ext.benchmark.measure import MEGABYTE

Record = dict[str, Any]


def megabytes_added(record: Record) -> float:
    """Returns the megabytes that iterations added."""
    return float(record["bytes_peak"] - record["bytes_before"]) / MEGABYTE


def draw(records: list[Record], path: Path) -> None:
    """Draws time and memory over K, and over tasks."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    columns = (("steps", "inner steps"), ("tasks", "tasks"))
    for column, (over, label) in enumerate(columns):
        chosen = [r for r in records if over in r and "failed" not in r]
        for name in dict.fromkeys(r["name"] for r in chosen):
            rows = sorted((r for r in chosen if r["name"] == name), key=lambda r: r[over])
            places = [r[over] for r in rows]
            for panel, values in (
                (panels[0][column], [r["seconds"] for r in rows]),
                (panels[1][column], [megabytes_added(r) for r in rows]),
            ):
                panel.plot(places, values, marker="o", markersize=3, label=name)
        panels[0][column].set(ylabel="seconds a meta-iteration", xlabel=label)
        panels[1][column].set(ylabel="memory added, MB", xlabel=label)
        for panel in panels[:, column]:
            panel.set(xscale="log", yscale="log")
            places = sorted({r[over] for r in chosen})
            panel.set_xticks(places, list(map(str, places)))
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
        if chosen:
            panels[0][column].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
