"""What the demonstration shows: progress bars, a table, a picture and a JSON file."""

from __future__ import annotations

import io
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, on machines without a display too

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from tqdm import tqdm

BAR = "{desc:<7} {percentage:3.0f}% |{bar:20}| {n:.0f}/{total:.0f} s{postfix}"
COLOURS = {"MAML": "tab:gray", "MAML++": "tab:blue"}
PACKAGES = ("mamlpp_ext", "torch", "higher", "torchopt", "numpy", "scikit-learn", "pillow")


class Bars:
    """A progress bar for each learner; into a file or a pipe, a line at every tenth.

    Args:
        names: of the learners.
        seconds: the training time of each.
    """

    def __init__(self, names: Sequence[str], seconds: float) -> None:
        self.live = sys.stderr.isatty()
        stream = sys.stderr if self.live else io.StringIO()
        self.bars = {
            name: tqdm(total=seconds, desc=name, position=place, file=stream, bar_format=BAR)
            for place, name in enumerate(names)
        }
        self.tenths = dict.fromkeys(names, 0)

    def show(self, name: str, seconds: float, loss: float, meta_lr: float, iterations: int) -> None:
        """Moves a learner's bar."""
        bar = self.bars[name]
        bar.set_postfix_str(
            f"loss {loss:.3f}, meta rate {meta_lr:.1e}, iteration {iterations}", refresh=False
        )
        bar.update(min(seconds, bar.total) - bar.n)
        tenth = int(10 * bar.n / bar.total)
        if not self.live and tenth > self.tenths[name]:
            self.tenths[name] = tenth
            print(bar, file=sys.stderr, flush=True)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for bar in self.bars.values():
            bar.close()


def write_report(
    settings: dict[str, Any], results: dict[str, Any], folder: Path, data: str = ""
) -> None:
    """Prints the table, then writes ``demo.png`` and ``demo.json`` into ``folder``.

    Args:
        settings: the flags.
        results: what was found, by learner.
        folder: where to; made if missing.
        data: what was read.
    """
    print(table(settings, results))
    folder.mkdir(parents=True, exist_ok=True)
    picture(settings, results, folder / "demo.png")
    record = {"settings": settings, "data": data, "versions": versions(), "results": results}
    (folder / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {folder / 'demo.png'} and {folder / 'demo.json'}")


def versions() -> dict[str, str | None]:
    """Returns what it ran on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def table(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Returns the table, with a line that says who is ahead."""
    tasks = min(r["batch_statistics"]["tasks"] for r in results.values())
    lines = [
        "",
        f"{settings['ways']}-way {settings['shots']}-shot, {settings['steps']} inner steps, "
        f"{settings['filters']} filters, {settings['backend']}; accuracy over {tasks} unseen tasks "
        "with its 95 % interval",
        "(support images by batch statistics; target images by those of the batch, or the running "
        "ones)",
        f"{'':8}{'iterations':>11}{'ms/iteration':>14}{'batch statistics':>20}"
        f"{'running statistics':>21}",
    ]
    for name, r in results.items():
        batch, running = _percent(r["batch_statistics"]), _percent(r["running_statistics"])
        lines.append(
            f"{name:8}{r['iterations']:>11}{r['ms_per_iteration']:>14.1f}{batch:>20}{running:>21}"
        )
    return "\n".join([*lines, *_verdict(results)])


def _percent(found: dict[str, float]) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['interval']:.1f} %"


def _verdict(results: dict[str, Any]) -> list[str]:
    if len(results) < 2:
        return ["One of the learners failed: see its message above."]
    plain, plus = (results[name]["batch_statistics"] for name in ("MAML", "MAML++"))
    lead = 100 * (plus["accuracy"] - plain["accuracy"])
    apart = abs(lead) > 100 * (plus["interval"] + plain["interval"])
    place = "ahead by" if lead > 0 else "behind by"
    extent = "beyond both intervals" if apart else "within the intervals"
    early = "Interrupted. " if any(r["interrupted"] for r in results.values()) else ""
    return [f"{early}MAML++ is {place} {abs(lead):.1f} points with batch statistics, {extent}."]


def picture(settings: dict[str, Any], results: dict[str, Any], path: Path) -> None:
    """Draws accuracy over time, the learned rates and the loss weights."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    for name, r in results.items():
        _draw_curve(left, name, r["curve"])
    left.set(xlabel="training time (s)", ylabel="accuracy (%)", title="Unseen tasks")
    left.legend()
    left.grid(alpha=0.3)
    if "MAML++" in results:
        _draw_rates(middle, results["MAML++"]["rates"], settings["inner_lr"])
        _draw_weights(right, results["MAML++"]["history"])
    figure.suptitle(
        f"{settings['ways']}-way {settings['shots']}-shot, {settings['backend']}, "
        f"{settings['minutes']:g} minutes each"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_curve(axes: Axes, name: str, curve: list[dict[str, float]]) -> None:
    seconds = [point["seconds"] for point in curve]
    accuracy = 100 * np.array([point["accuracy"] for point in curve])
    interval = 100 * np.array([point["interval"] for point in curve])
    axes.plot(seconds, accuracy, marker="o", label=name, color=COLOURS[name])
    axes.fill_between(
        seconds, accuracy - interval, accuracy + interval, alpha=0.2, color=COLOURS[name]
    )


def _draw_rates(axes: Axes, rates: dict[str, list[float]], start: float) -> None:
    values = np.array(list(rates.values()))
    reach = max(float(np.abs(values - start).max()), 1e-6)
    image = axes.imshow(
        values, aspect="auto", cmap="RdBu_r", vmin=start - reach, vmax=start + reach
    )
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.set_xticks(range(values.shape[1]))
    axes.set(xlabel="inner step", title=f"Learned inner rates (white: {start:g}, the start)")
    axes.figure.colorbar(image, ax=axes)


def _draw_weights(axes: Axes, history: list[dict[str, Any]]) -> None:
    epochs = [entry["epoch"] for entry in history]
    weights = np.array([entry["loss_weights"] for entry in history])
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, weights.shape[1]))
    for step, colour in enumerate(colours):
        axes.step(epochs, weights[:, step], where="post", label=f"step {step}", color=colour)
    axes.set(xlabel="epoch", ylabel="weight of the target loss", title="Multi-step loss")
    axes.legend()
