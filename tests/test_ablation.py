"""The ablation: every row trains, and a run killed at any moment ends as if it had not been."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablation
import ablation_checkpoint
import ablation_protocol
import ablation_report
import ablation_run
import few_shot

ROOT = Path(few_shot.__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "ablation.py"
TINY = {
    "ways": 3,
    "targets": 1,
    "steps": 2,
    "filters": 4,
    "epochs": 6,
    "iterations": 2,
    "val-every": 2,
    "multi-step-loss": 2,
    "first-order": 2,
    "val-tasks": 3,
    "test-tasks": 4,
    "eval-targets": 2,
    "jobs": 2,
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random characters, small enough for a run of seconds."""
    path = tmp_path_factory.mktemp("data") / "characters.npz"
    images = np.random.default_rng(0).integers(0, 256, (1210, 4, 8, 8), dtype=np.uint8)
    np.savez(path, images=images)
    return path


def start(archive: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    return subprocess.Popen(
        [sys.executable, SCRIPT, f"--data={archive}", *tiny, f"--out={out}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    table, errors = run.communicate(timeout=300)  # a busy machine is no failure
    return run.returncode, table, errors


def numbers(out: Path) -> list[dict[str, Any]]:
    """Every record without what a clock measured."""
    records = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_every_row_and_the_report(archive: Path, tmp_path: Path) -> None:
    code, table, errors = finish(start(archive, tmp_path, "--seeds=0"))
    assert code == 0, errors
    rows = ["MAML", "MAML-tuned", "+MSL", "+DA", "+BNRS+BNWB", "+LSLR", "+CA", "MAML++"]
    records = numbers(tmp_path)
    assert [r["row"] for r in records if r["kind"] == "test"] == rows
    assert len(records) == len(rows) * (3 + 1)
    assert all(f"| {row} | 0 |" in table for row in rows)
    by_row = {r["row"]: r for r in records if r["kind"] == "test"}
    assert by_row["MAML"]["rates"] is None
    assert by_row["MAML"]["norm_weights"] == {}
    assert len(by_row["+BNRS+BNWB"]["norm_weights"]["norm1"]) == 2
    assert (by_row["MAML"]["meta_lr"], by_row["MAML-tuned"]["meta_lr"]) == (3e-3, 1e-3)
    assert by_row["+CA"]["meta_lr"] < 1e-3
    line = int(table.rsplit("line ", 1)[1].split(" ")[0])
    assert records[line - 1] == by_row["MAML++"]
    for name in ("curves.png", "rates.png", "norm_weights.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_killed_three_times_it_ends_with_the_same_numbers(archive: Path, tmp_path: Path) -> None:
    flags = ("--seeds=0", "--rows", "MAML++", "--checkpoint-minutes=0", "--epochs=30")
    assert finish(start(archive, tmp_path / "undisturbed", *flags))[0] == 0
    moments = random.Random(0)
    checkpoint = tmp_path / "killed" / "runs" / "MAMLplusplus-seed0" / "checkpoint.pt"
    totals = []
    for _ in range(3):
        run = start(archive, tmp_path / "killed", *flags)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        run.kill()
        finish(run)  # the processes it started have ended too
        totals.append(torch.load(checkpoint, weights_only=True)["position"]["total"])
    assert 0 < totals[0] < totals[1] < totals[2] < 60
    assert finish(start(archive, tmp_path / "killed", *flags))[0] == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")
    assert not list(tmp_path.glob("**/*.tmp"))


class Scalars:
    """Stands in for TensorBoard's writer, whose package need not be here."""

    def __init__(self, folder: Path) -> None:
        self.seen: dict[tuple[str, int], float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen[name, step] = value

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("fail_at", [2, 4])  # after the records of the validation, of the test
def test_killed_between_its_two_files_it_loses_no_record(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = ablation_protocol.Protocol(
        ways=3, filters=4, epochs=1, iterations=1, val_every=1, val_tasks=2, test_tasks=2
    )
    monkeypatch.setattr(ablation_run, "SummaryWriter", None)
    replace, writes = ablation_checkpoint._replace, []

    def killed(path: Path, write: Any) -> None:
        writes.append(path)
        if len(writes) == fail_at:
            raise KeyboardInterrupt
        replace(path, write)

    monkeypatch.setattr(ablation_checkpoint, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ablation_run.AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path).run(60)
    again = ablation_run.AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path)
    again.run(60)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["validation", "test"]
    assert records == again.records


def test_ctrl_c_ends_it_at_once_and_it_goes_on(archive: Path, tmp_path: Path) -> None:
    flags = ("--seeds=0", "--rows", "MAML", "--epochs=400", "--val-every=100")
    run = start(archive, tmp_path, *flags, "--checkpoint-minutes=0")
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    began = time.monotonic()
    code, _, _ = finish(run)
    assert code == 130
    assert time.monotonic() - began < 10
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_tensorboard_gets_what_the_records_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_run, "SummaryWriter", Scalars)
    sizes = {"ways": 3, "filters": 4, "epochs": 4, "iterations": 1, "val_every": 2}
    tasks = {"val_tasks": 2, "test_tasks": 2, "eval_targets": 2}
    protocol = ablation_protocol.Protocol(**sizes, **tasks)
    run = ablation_run.AblationRun("MAML++", 0, protocol, few_shot.load(), tmp_path)
    run.run(checkpoint_seconds=60)
    assert [r["kind"] for r in run.records] == ["validation", "validation", "test"]
    for r in run.records:
        assert run.writer.seen["loss", r["iterations"]] == r["loss"]
        for name in ("batch_statistics", "running_statistics"):
            assert run.writer.seen[f"{r['kind']}/{name}", r["iterations"]] == r[name]["accuracy"]


def test_paper_preset_is_the_papers() -> None:
    flags = ablation.make_parser().parse_args(
        ["--data=x", "--preset=paper-omniglot-20way-1shot", "--tasks=2"]
    )
    protocol = ablation.read_protocol(flags)
    assert (protocol.filters, protocol.steps, protocol.ways, protocol.shots) == (64, 5, 20, 1)
    assert protocol.epochs * protocol.iterations == 50_000
    assert (protocol.multi_step_loss, protocol.first_order) == (10, 50)
    assert (protocol.inner_lr, protocol.meta_lr, protocol.final_meta_lr) == (0.1, 1e-3, 1e-5)
    assert protocol.tasks == 2  # a flag wins
    assert "MAML-tuned" not in protocol.rows()  # its meta rate is plain MAML's too


def test_a_time_instead_of_iterations(tmp_path: Path) -> None:
    protocol = ablation_protocol.Protocol(
        ways=3, filters=4, epochs=2, minutes=0.01, val_every=1, val_tasks=2, test_tasks=2
    )
    run = ablation_run.AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path)
    run.run(checkpoint_seconds=60)
    assert 0.6 <= run.records[-1]["seconds"] < 5
    assert run.records[0]["iterations"] >= 1


def test_another_protocol_is_refused(archive: Path, tmp_path: Path) -> None:
    flags = ("--seeds=0", "--rows", "MAML")
    assert finish(start(archive, tmp_path, *flags))[0] == 0
    code, _, errors = finish(start(archive, tmp_path, *flags, "--filters=5"))
    assert code == 2
    assert "take the same ones to go on" in errors
    code, _, other = finish(start(archive, tmp_path, "--seeds=1", "--rows=+CA", "--filters=5"))
    assert code == 1
    assert "several values of filters" in other
    assert "made with other settings (there, here): {'filters': (4, 5)}" in errors


def test_a_setting_that_a_row_does_not_use_may_differ() -> None:
    def records(*rows: str) -> list[dict[str, object]]:
        return [
            {"row": row, "settings": {"ways": 20, "first_order": epochs}}
            for epochs, row in enumerate(rows)
        ]

    common = ablation_report.common_settings
    found = common(records("MAML", "MAML++", "+CA"))
    assert found == {"data": "Omniglot, 28x28, grey", "ways": 20, "first_order": 1}
    with pytest.raises(ValueError, match="first_order"):
        common(records("+DA", "MAML++"))


def test_one_writer_at_a_time(archive: Path, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = finish(start(archive, tmp_path))
    assert code == 2
    assert "another ablation is writing to" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filters=0"], "--filters must be above 0, got 0"),
        (["--data=nowhere.npz"], "no data at nowhere.npz"),
        (["--eval-targets=4"], "1 shots and 4 targets need 5 drawings of each class"),
        (["--first-order=-1"], "--first-order must be at least 0 (epochs), got -1"),
        (["--jobs=0"], "argument --jobs: invalid choice: 0"),
        (["--preset=huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_flags_are_refused(
    archive: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    code, _, errors = finish(start(archive, tmp_path, *flags))
    assert code == 2
    assert message in errors
