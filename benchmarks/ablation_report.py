"""What the ablation shows: a Markdown table, all records in one file, and pictures."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from ablation_protocol import ROWS, TUNED
from learners import STATISTICS

Record = dict[str, Any]
# The paper's table 1, Omniglot 20-way 1-shot, in per cent.
PAPER = {
    "MAML": "91.27",
    TUNED: "91.27",
    "+MSL": "91.53",
    "+DA": "92.3",
    "+BNRS+BNWB": "95.35",
    "+LSLR": "95.77",
    "+CA": "93.03",
    "MAML++": "97.65",
}
USERS = {  # which rows a setting matters to, where it is not all
    "first_order": lambda row: "DA" in ROWS[row],
    "multi_step_loss": lambda row: "MSL" in ROWS[row],
    "final_meta_lr": lambda row: "CA" in ROWS[row],
    "tuned_meta_lr": lambda row: row == TUNED,
}
LINES: dict[str, dict[str, Any]] = {  # what is compared stands out from the parts between
    "MAML": {"color": "black", "linewidth": 2},
    TUNED: {"color": "black", "linewidth": 2, "linestyle": "--"},
    "+MSL": {"color": "tab:orange"},
    "+DA": {"color": "tab:green"},
    "+BNRS+BNWB": {"color": "tab:red"},
    "+LSLR": {"color": "tab:purple"},
    "+CA": {"color": "tab:brown"},
    "MAML++": {"color": "tab:blue", "linewidth": 3},
}


def write_report(folder: Path, arguments: list[str]) -> str:
    """Writes everything there is to ``folder`` from the records below it; returns the table."""
    records = [
        json.loads(line)
        for file in sorted(folder.glob("runs/*/records.jsonl"))
        for line in file.read_text().splitlines()
    ]
    _common_settings(records)
    rows = [row for row in PAPER if any(record["row"] == row for record in records)]
    records.sort(key=lambda record: (rows.index(record["row"]), record["seed"]))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "evaluations.jsonl").write_text(lines)
    text = table(records, rows, arguments)
    (folder / "table.md").write_text(text)
    draw_curves(records, rows, folder / "curves.png")
    last = [r for r in records if r["kind"] == "test" and r["row"] == rows[-1]][-1:]
    for name, draw in (("rates.png", draw_rates), ("norm_weights.png", draw_norm_weights)):
        if last:
            draw(last[0], folder / name)
    return text


def _common_settings(records: list[Record]) -> dict[str, Any]:
    """Returns the settings of all; those that only some rows use may differ in the others."""
    common: dict[str, Any] = {}
    for record in records:
        for name, value in record["settings"].items():
            users = USERS.get(name)
            if users is not None and not users(record["row"]):
                continue
            if common.setdefault(name, value) != value:
                raise ValueError(
                    f"the runs have several values of {name} ({common[name]} and {value}), which "
                    "one table cannot show; give each protocol an --out of its own"
                )
    return common


def table(records: list[Record], rows: list[str], arguments: list[str]) -> str:
    """Returns the means over seeds, then each run with the line of its record."""
    tests = [(number, r) for number, r in enumerate(records, 1) if r["kind"] == "test"]
    if not tests:
        return "No run has ended yet.\n"
    lines = [
        *_header(_common_settings(records), sorted({r["seed"] for _, r in tests})),
        "",
        "| row | batch statistics | running statistics | paper (other settings) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        runs = [r for _, r in tests if r["row"] == row]
        if runs:
            cells = [_over_seeds([r[name] for r in runs]) for name in STATISTICS]
            lines.append(f"| {row} | {' | '.join(cells)} | {PAPER[row]} |")
    lines += [
        "",
        f"Command: `python benchmarks/ablation.py {shlex.join(arguments)}`. Machine: "
        + "; ".join(dict.fromkeys(r["machine"] for _, r in tests))
        + ". Versions: "
        + "; ".join(dict.fromkeys(_versions(r) for _, r in tests))
        + ".",
        "",
        "| row | seed | batch statistics | running statistics | picked at epoch | record |",
        "|---|---|---|---|---|---|",
    ]
    for number, r in tests:
        cells = [_over_seeds([r[name]]) for name in STATISTICS]
        lines.append(
            f"| {r['row']} | {r['seed']} | {' | '.join(cells)} | {r['picked_epoch']} | "
            f"evaluations.jsonl, line {number} |"
        )
    return "\n".join(lines) + "\n"


def _header(settings: dict[str, Any], seeds: list[int]) -> list[str]:
    length = f"{settings['epochs']} epochs of {settings['iterations']} iterations"
    if settings["minutes"] is not None:
        length = f"{settings['minutes']:g} minutes"
    tuned = f" ({settings['tuned_meta_lr']:g} in {TUNED})" if "tuned_meta_lr" in settings else ""
    return [
        f"Omniglot, {settings['ways']}-way {settings['shots']}-shot, {settings['filters']} "
        f"filters, {settings['steps']} inner steps, {settings['tasks']} tasks an iteration, "
        f"{length}, meta rate {settings['meta_lr']:g}{tuned}; "
        f"seeds {', '.join(map(str, seeds))}; {settings['test_tasks']} test tasks; backend "
        f"{settings['backend']}.",
        "",
        "Accuracy in per cent: mean over seeds ± 95 % interval over the tasks of a run (range over "
        "seeds). Batch: targets normalised together, as in the paper; running: one by one. The "
        "model tested is the one that validated best by batch statistics.",
    ]


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)


def _over_seeds(found: list[dict[str, float]]) -> str:
    values = [100 * f["accuracy"] for f in found]
    interval = 100 * statistics.mean(f["interval"] for f in found)
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f} ± {interval:.1f}{spread}"


def draw_curves(records: list[Record], rows: list[str], path: Path) -> None:
    """Validation accuracy over epochs, a line for each row, a band over its seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained", sharey=True)
    for plot, name in zip(axes, STATISTICS, strict=True):
        for row in rows:
            points: dict[int, list[float]] = {}  # by epoch: with --minutes, iterations differ
            for r in records:
                if r["row"] == row and r["kind"] == "validation":
                    points.setdefault(r["epoch"], []).append(100 * r[name]["accuracy"])
            x = sorted(points)
            plot.plot(x, [statistics.mean(points[i]) for i in x], label=row, **LINES[row])
            low, high = ([pick(points[i]) for i in x] for pick in (min, max))
            plot.fill_between(x, low, high, alpha=0.1, color=LINES[row]["color"], linewidth=0)
        plot.set(xlabel="epoch", title=name.replace("_", " "))
        plot.grid(alpha=0.3)
    axes[0].set_ylabel("validation accuracy (%), band: range over seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_rates(record: Record, path: Path) -> None:
    """The learned inner rates by parameter and step."""
    if record["rates"] is None:
        return
    names, values = list(record["rates"]), np.array(list(record["rates"].values()))
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    start = record["settings"]["inner_lr"]
    reach = max(float(np.abs(values - start).max()), 1e-6)
    image = axes.imshow(values, cmap="RdBu_r", vmin=start - reach, vmax=start + reach)
    for (line, step), value in np.ndenumerate(values):
        ink = "white" if abs(value - start) > 0.6 * reach else "black"
        axes.text(step, line, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(values.shape[1]))
    axes.set(xlabel="inner step", title=f"{record['row']}: inner rates (white: {start:g})")
    axes.set_aspect("auto")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_norm_weights(record: Record, path: Path) -> None:
    """The per-step weights of every norm layer: a row of the picture for a step."""
    layers = record["norm_weights"]
    if not layers:
        return
    figure, plots = plt.subplots(
        len(layers), 1, figsize=(10, 1.6 * len(layers)), layout="constrained", squeeze=False
    )
    reach = max(float(np.abs(np.array(v) - 1).max()) for v in layers.values())
    for plot, (name, weights) in zip(plots[:, 0], layers.items(), strict=True):
        image = plot.imshow(weights, aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
        plot.set(ylabel="inner step", title=f"{name}.weight (white: 1)", yticks=range(len(weights)))
    plots[-1, 0].set_xlabel("channel")
    figure.colorbar(image, ax=plots[:, 0])
    figure.savefig(path, dpi=110)
    plt.close(figure)
