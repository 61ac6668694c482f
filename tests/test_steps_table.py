"""The table over inner steps: trained, killed, gone on with, and told in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steps_table
from test_ablation import ROOT, finish, numbers
from test_image_data import archives

SCRIPT = ROOT / "benchmarks" / "steps_table.py"
TINY = {
    "ways": 3,
    "targets": 1,
    "filters": 4,
    "tasks": 2,
    "epochs": 2,
    "iterations": 1,
    "val-every": 2,
    "val-tasks": 2,
    "test-tasks": 4,
    "eval-targets": 2,
    "seeds": 0,
    "jobs": 2,
}


def start(data: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    return subprocess.Popen(
        [sys.executable, SCRIPT, f"--data={data}", *tiny, f"--out={out}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_table_records_and_picture_and_going_on(tmp_path: Path) -> None:
    data, out = archives(tmp_path / "data"), tmp_path / "out"
    code, table, errors = finish(start(data, out, "--inner-steps", "1"))
    assert code == 0, errors
    assert errors.count("finished") == 2
    first = numbers(out)
    code, table, errors = finish(start(data, out, "--inner-steps", "1", "2"))
    assert code == 0, errors
    records = numbers(out)
    assert [r for r in records if r["settings"]["steps"] == 1] == first  # not trained again
    tests = [r for r in records if r["kind"] == "test"]
    assert [(r["row"], r["settings"]["steps"]) for r in tests] == [
        ("MAML-tuned", 1),
        ("MAML-tuned", 2),
        ("MAML++", 1),
        ("MAML++", 2),
    ]
    assert {r["iterations"] for r in tests} == {2}
    assert {r["row"]: r["meta_lr"] for r in tests}["MAML-tuned"] == 1e-3
    assert "| inner steps | MAML-tuned, meta rate 0.001 | MAML++, meta rate 0.003 |" in table
    assert "One inner step of MAML++ is " in table
    assert "of MAML-tuned by " in table
    line = int(table.rsplit("line ", 1)[1].split(" ")[0])
    assert records[line - 1] == tests[-1]
    assert (out / "table.md").read_text().strip() == table.strip()
    assert (out / "steps.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=3"], "--inner-steps takes the numbers of steps, each at least 1; got --steps 3"),
        (["--inner-steps=0"], "got --steps None, --inner-steps [0]"),
        (["--ways=30"], "30 ways need as many classes"),
        (["--preset=huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    data = archives(tmp_path / "data")
    with pytest.raises(SystemExit, match="2"):
        steps_table.main([f"--data={data}", f"--out={tmp_path / 'out'}", *flags])
    assert message in capsys.readouterr().err


def record(row: str, steps: int, accuracy: float, interval: float = 0.01) -> dict[str, Any]:
    found = {"accuracy": accuracy, "interval": interval}
    return {"row": row, "seed": 0, "settings": {"steps": steps}, "batch_statistics": found}


@pytest.mark.parametrize(
    ("plus", "words"),
    [
        (0.45, "ahead of 5 of MAML by 5.0 points, beyond both intervals."),
        (0.41, "ahead of 5 of MAML by 1.0 points, within the intervals."),
        (0.35, "behind 5 of MAML by 5.0 points, beyond both intervals."),
    ],
)
def test_the_claim_in_words(plus: float, words: str) -> None:
    tests = [record("MAML", 1, 0.3), record("MAML", 5, 0.4), record("MAML++", 1, plus)]
    assert steps_table.claim(tests) == [f"One inner step of MAML++ is {words}"]
    assert steps_table.claim(tests[:2]) == []
    assert steps_table.claim(tests[2:]) == []


def test_nothing_has_ended(tmp_path: Path) -> None:
    assert steps_table.write_report(tmp_path, []) == "No run has ended yet.\n"
    folder = tmp_path / "steps-1" / "runs" / "MAML-seed0"
    folder.mkdir(parents=True)
    line = {**record("MAML", 1, 0.3), "kind": "validation"}
    (folder / "records.jsonl").write_text(json.dumps(line) + "\n")
    assert steps_table.write_report(tmp_path, []) == "No run has ended yet.\n"
