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
OMNIGLOT = "Omniglot, 28x28, grey"  # what the records are of that say nothing of their data
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
    common_settings(records)
    rows = [row for row in ROWS if any(record["row"] == row for record in records)]
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


def common_settings(records: list[Record]) -> dict[str, Any]:
    """Returns the settings of all; those that only some rows use may differ in the others."""
    common: dict[str, Any] = {}
    for record in records:
        for name, value in {"data": record.get("data", OMNIGLOT), **record["settings"]}.items():
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
    settings = common_settings(records)
    of_paper = (settings["data"], settings["ways"], settings["shots"]) == (OMNIGLOT, 20, 1)
    columns = [*STATISTICS, *(["ensemble"] if all("ensemble" in r for _, r in tests) else [])]
    heads = [name.replace("_", " ") for name in columns]
    last = ["paper (other settings)"] if of_paper else []
    lines = [*_header(settings, sorted({r["seed"] for _, r in tests})), ""]
    lines += heads_of(["row", *heads, *last])
    for row in rows:
        runs = [r for _, r in tests if r["row"] == row]
        if runs:
            cells = [over_seeds([_found(r, name) for r in runs]) for name in columns]
            lines += [line_of([row, *cells, *([PAPER[row]] if of_paper else [])])]
    lines += ["", *origin("ablation.py", arguments, [r for _, r in tests]), ""]
    lines += heads_of(["row", "seed", *heads, "picked at epoch", "record"])
    for number, r in tests:
        cells = [over_seeds([_found(r, name)]) for name in columns]
        place = f"evaluations.jsonl, line {number}"
        lines += [line_of([r["row"], r["seed"], *cells, r["picked_epoch"], place])]
    return "\n".join(lines) + "\n"


def _found(record: Record, name: str) -> dict[str, float]:
    """Returns an accuracy; the ensemble's is by batch statistics, as the paper's figures."""
    found: dict[str, Any] = record[name]
    return found["batch_statistics"] if name == "ensemble" else found


def heads_of(heads: list[str]) -> list[str]:
    """Returns the first two lines of a table."""
    return [line_of(heads), "|" + "---|" * len(heads)]


def line_of(cells: list[Any]) -> str:
    """Returns a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def origin(script: str, arguments: list[str], tests: list[Record]) -> list[str]:
    """Returns by which command, on which machines and with which versions it was measured."""
    return [
        f"Command: `python benchmarks/{script} {shlex.join(arguments)}`. Machine: "
        + "; ".join(dict.fromkeys(r["machine"] for r in tests))
        + ". Versions: "
        + "; ".join(dict.fromkeys(_versions(r) for r in tests))
        + "."
    ]


def _header(settings: dict[str, Any], seeds: list[int]) -> list[str]:
    tuned = f" ({settings['tuned_meta_lr']:g} in {TUNED})" if "tuned_meta_lr" in settings else ""
    together = (
        f" Ensemble: the {settings['ensemble']} models that validated best, the means of their "
        "logits, by batch statistics."
        if settings.get("ensemble")
        else ""
    )
    return [
        f"{described(settings)}, {settings['steps']} inner steps, meta rate "
        f"{settings['meta_lr']:g}{tuned}; seeds {', '.join(map(str, seeds))}; "
        f"{settings['test_tasks']} test tasks; backend {settings['backend']}.",
        "",
        "Accuracy in per cent: mean over seeds ± 95 % interval over the tasks of a run (range over "
        "seeds). Batch: targets normalised together, as in the paper; running: one by one. The "
        "model tested is the one that validated best by batch statistics." + together,
    ]


def described(settings: dict[str, Any]) -> str:
    """Returns what is alike in all runs but the inner steps and the meta rate."""
    length = f"{settings['epochs']} epochs of {settings['iterations']} iterations"
    if settings["minutes"] is not None:
        length = f"{settings['minutes']:g} minutes"
    clamp = settings.get("clamp")
    return (
        f"{settings['data']}, {settings['ways']}-way {settings['shots']}-shot, "
        f"{settings['filters']} filters, {settings['tasks']} tasks an iteration of "
        f"{settings['targets']} targets a class, {length}, inner rate {settings['inner_lr']:g}"
        + (f", meta-gradients within ±{clamp:g}" if clamp else "")
        + (", mirrored by chance" if settings.get("flip") else "")
    )


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)


def over_seeds(found: list[dict[str, float]]) -> str:
    """Returns the mean with the mean interval, and the range if there are several seeds."""
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
