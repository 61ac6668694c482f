"""The soak: it finds what a kill could do to a run, and passes where nothing was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import few_shot
import soak

ROOT = Path(few_shot.__file__).parents[2]


def stretches() -> list[dict[str, Any]]:
    """Two stretches, a kill between them, as :func:`soak.stretch` returns them."""
    summary = {name: {"accuracy": 0.5} for name in ("batch_statistics", "running_statistics")}
    shared = {"seconds": 1.0, "loss": 1.0, "machine": "", "versions": {}, "settings": {}}
    records = [
        {"kind": "validation", "epoch": epoch, "iterations": 10 * epoch, **summary, **shared}
        for epoch in range(1, soak.EPOCHS + 1)
    ]
    records.append({**records[-1], "kind": "test"})
    memory = [(second, 600.0) for second in range(100)]
    part = {"wall_seconds": 100.0, "training_seconds": 90.0, "memory_mb": memory}
    return [
        {**part, "killed": True, "iterations": 35, "records": records[:3]},
        {**part, "killed": False, "iterations": 10 * soak.EPOCHS, "records": records},
    ]


def failed(parts: list[dict[str, Any]]) -> list[str]:
    checks = soak.findings(parts, settle=60)["checks"]
    return [name for name, holds in checks.items() if not holds]


def test_nothing_lost_passes() -> None:
    assert failed(stretches()) == []


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda a, b: b["records"].pop(7), "every epoch validated once"),
        (lambda a, b: b["records"].insert(7, b["records"][7]), "every epoch validated once"),
        (lambda a, b: b["records"][7].update(iterations=1), "iterations increase"),
        (lambda a, b: a["records"].append({"kind": "validation"}), "no kill lost a record"),
        (lambda a, b: a.update(iterations=10**6), "no start fell behind"),
        (lambda a, b: b["records"].pop(), "tested at the end"),
        (
            lambda a, b: b.update(memory_mb=[(s, 600.0 + s) for s in range(100)]),
            "memory did not grow",
        ),
    ],
)
def test_what_a_kill_could_do_is_found(damage: Any, found: str) -> None:
    parts = stretches()
    damage(*parts)
    assert found in failed(parts)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_short_soak(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1210, 4, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "characters.npz", images=images)
    tiny = ["--ways=3", "--targets=1", "--eval-targets=2", "--steps=2", "--filters=4"]
    tiny += ["--val-tasks=2", "--test-tasks=2"]
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *tiny]
    command += [f"--data={tmp_path}/characters.npz", "--minutes=0.15", "--kills=1"]
    run = subprocess.run(
        [*command, f"--out={tmp_path}/soak"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    report = json.loads((tmp_path / "soak" / "soak.json").read_text())
    checks = report["checks"]
    for busy in ("iterations increase", "memory did not grow"):  # on a busy machine, not in 9 s
        del checks[busy]
    assert all(checks.values()), run.stderr
    assert [part["killed"] for part in report["stretches"]] == [True, False]
    assert len(report["curve"]) == soak.EPOCHS
    assert (tmp_path / "soak" / "soak.png").stat().st_size > 10_000
