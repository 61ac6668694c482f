"""The two files of a run, each of which is whole at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ablation_protocol import Protocol


def save(
    folder: Path, who: dict[str, Any], state: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Writes ``records.jsonl`` and ``checkpoint.pt`` into ``folder``."""
    # The records first: a kill between the two then repeats an evaluation, and loses none.
    lines = "".join(json.dumps(record) + "\n" for record in records)
    _replace(folder / "records.jsonl", lambda path: path.write_text(lines))
    whole = {"who": who, **state, "records": records}
    _replace(folder / "checkpoint.pt", lambda path: torch.save(whole, path))


def load(checkpoint: Path, who: dict[str, Any], device: str) -> dict[str, Any]:
    """Returns what :func:`save` was given, on ``device``.

    Raises:
        ValueError: if it was another run's, or one of another protocol.
    """
    state: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
    theirs = {**asdict(Protocol()), **state["who"]}  # it may be older than a setting
    differ = {key: (theirs[key], value) for key, value in who.items() if theirs[key] != value}
    if differ:
        raise ValueError(
            f"{checkpoint} was made with other settings (there, here): {differ}; take the "
            "same ones to go on, or another --out to begin anew"
        )
    if isinstance(state["best"], dict):  # before there was an ensemble it was one model, or none
        state["best"] = [state["best"]] if "net" in state["best"] else []
    return state


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes aside and renames, so that a kill at any moment leaves a whole file."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
