"""Sphinx directives of the guides: what changes from before to after, and what that brings.

``{guide-diff} NAME`` shows the diff of ``examples/maml_NAME_before.py`` and ``_after.py`` with its
count of lines, ``{guide-measured} NAME`` what ``examples/measure_guides.py`` recorded of them.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS / "examples"
MEASURED = DOCS / "guides" / "measured.json"


def changes(name: str) -> list[str]:
    """Returns the unified diff of a guide's scripts, its two lines of file names first."""
    paths = [EXAMPLES / f"maml_{name}_{which}.py" for which in ("before", "after")]
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in paths)
    return list(difflib.unified_diff(before, after, *(path.name for path in paths), lineterm=""))


def count(diff: list[str]) -> tuple[int, int]:
    """Returns how many lines a unified diff adds and removes."""
    added, removed = (sum(line.startswith(sign) for line in diff[2:]) for sign in "+-")
    return added, removed


def measured(name: str) -> tuple[list[list[str]], str, str]:
    """Returns the rows of a guide's table, the headings first, what they are of and the command."""
    record = json.loads(MEASURED.read_text(encoding="utf-8"))[name]
    rows = [["", "accuracy (lowest to highest seed)", "processor time of a training batch"]]
    for which, label in (("before", "MAML"), ("after", "MAML++")):
        accuracies = sorted(100 * run["accuracy"] for run in record[which])
        times = [run["ms"] for run in record[which]]
        mean, low, high = sum(accuracies) / len(accuracies), accuracies[0], accuracies[-1]
        rows.append(
            [label, f"{mean:.1f} % ({low:.1f} to {high:.1f})", f"{sum(times) / len(times):.0f} ms"]
        )
    batches, seeds = record["epochs"] * record["iterations"], len(record["after"])
    how = (
        f"Digits, 5-way 1-shot, {batches} batches of 4 tasks, {seeds} seeds, unseen classes, batch "
        f"statistics; one core, torch {record['torch']}. Made by "
    )
    command = (
        f"python docs/examples/measure_guides.py --epochs {record['epochs']} "
        f"--iterations {record['iterations']} --tests {record['tests']} --seeds {seeds}"
    )
    return rows, how, command


class GuideDiff(SphinxDirective):
    """Shows how many lines change, and which."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        (name,) = self.arguments
        for which in ("before", "after"):
            self.env.note_dependency(str(EXAMPLES / f"maml_{name}_{which}.py"))
        diff = changes(name)
        added, removed = count(diff)
        says = nodes.paragraph()
        says += nodes.strong(text=f"{added} lines added, {removed} removed")
        says += nodes.Text(" between two scripts of ")
        says += nodes.literal(text="docs/examples")
        says += nodes.Text(", both of which run in the tests.")
        text = "\n".join(diff)
        block = nodes.literal_block(text, text, language="diff")
        return [says, block]


class GuideMeasured(SphinxDirective):
    """Shows accuracy and time before and after."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(MEASURED))
        rows, how, command = measured(self.arguments[0])
        says = nodes.paragraph()
        says += nodes.Text(how)
        says += nodes.literal(text=command)
        says += nodes.Text(".")
        return [_table(rows), says]


def _table(rows: list[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(rows[0]))
    group += [nodes.colspec(colwidth=1) for _ in rows[0]]
    parts = [nodes.thead(), nodes.tbody()]
    for place, row in enumerate(rows):
        line = nodes.row()
        for cell in row:
            line += nodes.entry("", nodes.paragraph(text=cell))
        parts[min(place, 1)] += line
    group += parts
    return nodes.table("", group)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directives."""
    app.add_directive("guide-diff", GuideDiff)
    app.add_directive("guide-measured", GuideMeasured)
    return {"parallel_read_safe": True}
