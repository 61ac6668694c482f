"""The speed comparison in benchmarks/: what it asks, and the table it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import compare
import contenders
import mamlpp_ext as mpp
import problems
import profile_iteration
import reference
import speed_memory
import speed_picture
import speed_report
import trainings
from mamlpp_ext.benchmark.measure import Memory
from mamlpp_ext.benchmark.question import Question

TINY = replace(problems.PROBLEMS["MLP"], tasks=1, steps=1, threads=1)


def memory(name: str, increase: int, **over: int) -> dict[str, Any]:
    return {
        "kind": "memory",
        "name": name,
        "bytes_before": 10**8,
        "bytes_peak": 10**8 + increase * 10**6,
        "seconds": 0.5,
        **over,
    }


def test_networks() -> None:
    with torch.no_grad():
        assert problems.conv4_20way()(torch.randn(2, 1, 28, 28)).shape == (2, 20)
        assert problems.mlp()(torch.randn(2, 20)).shape == (2, 5)
        net = problems.resnet12(widths=(2, 3, 4, 5))
        assert net(torch.randn(2, 3, 84, 84)).shape == (2, 5)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 12 + 4


def test_a_case_of_every_kind_runs() -> None:
    assert (
        len(cases.CASES) == 4 * len(problems.PROBLEMS) * 2 * 2
    )  # loops, problems, learners, orders
    for loop in ("bare torch", "task_batch_loss"):
        one = cases.iteration("MLP", "first", "MAML++", loop, steps=1)
        assert one.learner.lslr.num_steps == 1
        assert not one.learner.second_order
        assert cases.adaptation(one)().dim() == 0


def test_what_is_asked() -> None:
    asked = list(compare.pairs("cpu"))
    assert len({pair.name for pair in asked}) == len(asked) == 2 * 2 + 4
    goals = {pair.name: pair.goal for pair in asked}
    name = (
        "task_batch_loss with MAML++ / faster of higher's and torchopt's MAML, 5-way, first order"
    )
    assert goals[name] == 0.6
    for pair in asked:
        assert pair.question.second_order != ("first order" in pair.name)
        assert pair.question.ways == (20 if "20-way" in pair.name else 5)
    on_gpu = list(compare.pairs("cuda"))
    assert len({pair.name for pair in on_gpu}) == len(on_gpu) == len(asked) + 4 + 4
    goals = {pair.name: pair.goal for pair in on_gpu if pair.goal is not None}
    assert goals == {
        "task_batch_loss with MAML++ / higher's MAML, 8 tasks": 1 / 8,
        "task_batch_loss with MAML++ / higher's MAML, 32 tasks": 1 / 20,
        "MAML++ as a CUDA graph / higher's MAML, 8 tasks": 1 / 8,
        "MAML++ as a CUDA graph / higher's MAML, 32 tasks": 1 / 20,
    }
    assert [pair.question.tasks for pair in on_gpu[-4:]] == [8, 32, 8, 32]
    memory_asked = list(compare.memory_questions("cpu", 5, 4))
    assert {q.steps for _, q, _, over in memory_asked if "steps" in over} == set(contenders.STEPS)
    assert {q.tasks for _, q, _, over in memory_asked if "tasks" in over} == set(contenders.TASKS)
    assert {over for *_, places in memory_asked for over in places} == set(contenders.OVER)
    for _, question, _, over in memory_asked:
        net = question.prepare()[0]
        if "parameters" in over:
            assert sum(p.numel() for p in net.parameters()) == over["parameters"]
        if "filters" in over:
            assert net[0].out_channels == over["filters"]


def test_cells() -> None:
    cells = list(contenders.cells())
    assert len(set(cells)) == len(cells) == len(problems.PROBLEMS) * 4 * 2
    goals = {(cell.row, cell.loop): cell.goal for cell in cells}
    assert goals["Conv4-64 20-way, second order", "higher"] == 0.85
    assert goals["Conv4-64 20-way, first order", "higher"] == 1.0
    assert goals["MLP, second order", "task_batch_loss"] == 1.0
    for cell in cells:
        pair = cell.pair()
        assert pair.question.second_order == ("second order" in cell.row)
        assert (pair.over, pair.under) == (("MAML++", cell.loop), [("MAML", cell.loop)])


def test_a_cell_is_timed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "MLP", TINY)
    on = {"device": "cpu", "threads": 1}
    records = [
        compare.time_cell(contenders.Cell("MLP", loop, False), 1, on)
        for loop in ("bare torch", "higher")
    ]
    assert [len(seconds) for seconds in records[0]["seconds"].values()] == [5, 5]
    for record, over in zip(records, (0.002, 0.003), strict=True):
        record["seconds"] = {"MAML++": [over] * 3, "MAML": [0.002] * 3}
    title, _, row = speed_report._cells(records)
    assert title == "| MAML++ / MAML: median (quartiles), best | ≤ | bare torch | higher |"
    assert row == (
        "| MLP, first order | 1.00 | 1.000 (1.000 to 1.000), 2.0 / 2.0 ms "
        "| **1.500 (1.500 to 1.500)**, 3.0 / 2.0 ms |"
    )


def test_slope() -> None:
    assert speed_picture.slope([1, 2, 8], [5.0, 3.0, 12.0]) == pytest.approx(1.0)
    assert speed_picture.slope([1], [5.0]) is None


def test_a_ratio_is_timed() -> None:
    pair = compare.Pair("name", TINY, ("MAML++", "higher"), [("MAML", "higher")], 0.85)
    record = compare.time_pair(pair, rounds=2)
    assert list(record["seconds"]) == ["MAML++ in higher", "MAML in higher"]
    assert all(len(found) == 2 for found in record["seconds"].values())


def test_a_memory_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: Any, seconds: float) -> Any:
        raise TimeoutError(f"not done within {seconds:g} seconds")

    monkeypatch.setattr(compare, "in_fresh_process", late)
    record = compare.memory_record("a", print, over={"steps": 50}, seconds=60.0)
    assert record["failed"] == "not done within 60 seconds"
    assert speed_memory._amount(record) == "too long"


def test_report(tmp_path: Path) -> None:
    about = {
        "command": "python benchmarks/compare.py",
        "minutes": 9.0,
        "processor": "abacus",
        "device": "cpu",
        "threads": 2,
        "python": "3",
        "versions": {"torch": "2"},
        "seed": 0,
        "memory_ways": 5,
        "memory_tasks": 4,
    }
    times = {"x": [1.0, 1.0, 1.0], "slow": [1.0, 3.0, 3.0], "fast": [1.25, 2.0, 2.0]}
    records = [
        {"kind": "time", "name": "good", "goal": 0.7, "seconds": times},
        {"kind": "time", "name": "bad", "goal": 0.4, "seconds": times},
        {"kind": "time", "name": "any", "goal": None, "seconds": times},
        {"kind": "launches", "name": "a", "launches": 2, "kernels": 3, "kernel_seconds": 0.5},
        memory(speed_memory.PLAIN, 500, steps=20),
        memory(speed_memory.REMAT, 100, steps=20),
        memory(speed_memory.REMAT, 50, steps=5),
        memory(speed_memory.REMAT, 140, steps=50),
        memory(speed_memory.REMAT, 10**6, tasks=16),
        {"kind": "memory", "name": "MAML in higher", "steps": 50, "failed": "not done within 6"},
        {
            "kind": "reference",
            "name": "time",
            "seconds": {"ours": [1.0, 2.0, 1.0], "small": [3.0] * 3, "theirs": [2.0] * 3},
        },
        {**memory("ours", 500), "kind": "reference memory"},
        {**memory("theirs", 700), "kind": "reference memory"},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({**about, "records": records}))
    readme = tmp_path / "README.md"
    begin, end = speed_report.markers("cpu")
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    text = speed_report.write(tmp_path, readme)
    assert "| good (fast) | 0.500 (0.500 to 0.650) | 1000 / 1250 | ≤ 0.700 | met |" in text
    assert "| bad (fast) | 0.500 (0.500 to 0.650) | 1000 / 1250 | ≤ 0.400 | **missed** |" in text
    assert "| any (fast) | 0.500 (0.500 to 0.650) | 1000 / 1250 |  |  |" in text
    assert "| a | 2 | 3 | 500.0 |" in text
    row = "| rematerialised / plain, K = 20 | 0.333 | 0.200 | 100 / 500 | ≤ 0.300 | **missed** |"
    assert row in text
    row = "| rematerialised, K = 50 / K = 5 | 1.600 | 2.800 | 140 / 50 | ≤ 1.500 | **missed** |"
    assert row in text
    row = "| ours | 0.500 (0.500 to 0.750) | 1000 / 2000 | 0.750 | 500 / 700 | met | **missed** |"
    assert row in text
    row = "| small | 1.500 (1.500 to 1.500) | 3000 / 2000 | not measured |  | **missed** |  |"
    assert row in text
    assert "layout" not in text
    assert "| MAML in higher | - | - | too long |" in text
    assert "| MB added (peak), ms; over K, 5-way, 4 tasks | 5 | 20 | 50 |" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000
    written = readme.read_text()
    assert written.startswith(f"above\n{begin}\nCommand: ")
    assert written.endswith(f"{end}\nbelow\n")
    assert "old" not in written
    assert speed_report.write(tmp_path, readme) == text
    assert readme.read_text() == written  # twice is once

    own = [r for r in records if "reference" not in r["kind"]]
    on_gpu = speed_report.table({**about, "device": "cuda", "records": own})
    assert "| MB added, ms; over K, 5-way, 4 tasks | 5 | 20 | 50 |" in on_gpu
    assert "| MAML++ in rematerialised | 50, 500 | 100, 500 | 140, 500 |" in on_gpu
    assert "peak" not in on_gpu
    assert "authors' code" not in on_gpu
    (tmp_path / "speed.json").write_text(json.dumps({**about, "device": "cuda", "records": []}))
    with pytest.raises(ValueError, match="lacks the markers <!-- speed-gpu:begin -->"):
        speed_report.write(tmp_path, readme)
    (tmp_path / "speed.json").write_text(json.dumps({**about, "records": []}))
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the markers <!-- speed:begin -->"):
        speed_report.write(tmp_path, readme)


def test_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = compare.Pair("name", TINY, ("MAML++", "higher"), [("MAML", "higher")], 0.85)
    monkeypatch.setattr(compare, "pairs", lambda device: [pair])
    monkeypatch.setattr(
        compare, "in_fresh_process", lambda *a, seconds: (Memory(10**8, 2 * 10**8), 0.1)
    )
    monkeypatch.setattr(compare, "TRAINED_BY", ())
    monkeypatch.setattr(compare, "cells", lambda: [])
    readme = tmp_path / "README.md"
    readme.write_text("".join(speed_report.markers("cpu")))
    out = tmp_path / "results"
    flags = [f"--out={out}", f"--readme={readme}", "--threads=1", "--rounds=1"]
    compare.main(flags)
    found = json.loads((out / "speed.json").read_text())
    assert found["command"] == "python benchmarks/compare.py --threads 1 --rounds 1"
    assert len(found["records"]) == 1 + 5 * 5 + 6 * 4 + (5 + 4) * 3
    assert "![Time and memory" in readme.read_text()


def test_shares_of_a_training() -> None:
    paper, demo = (schedule.shares() for schedule in trainings.SCHEDULES)
    assert {kind: round(share, 9) for kind, share in paper.items()} == {
        "first order, every loss": 0.1,
        "first order, last loss": 0.4,
        "second order, every loss": 0,
        "second order, last loss": 0.5,
    }
    assert [round(share, 9) for share in demo.values()] == [0.05, 0, 0.05, 0.9]
    # The package's own schedules, called once an epoch, say the same.
    msl, da = mpp.MultiStepLoss(5, anneal_epochs=10), mpp.DerivativeOrderAnnealing(50)
    found = dict.fromkeys(trainings.KINDS, 0.0)
    for _ in range(100):
        found[trainings.kind_of(da.second_order, msl.counts(0))] += 0.01
        msl.step(), da.step()
    assert found == pytest.approx(paper)


def test_whole_trainings_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.PROBLEMS, "Conv4-64 5-way", replace(TINY, steps=2))
    flags = compare.make_parser().parse_args(["--threads=1", "--rounds=2"])
    record = compare.time_schedules(5, "bare torch", flags)
    kinds = ["MAML", *trainings.KINDS]
    assert list(record["seconds"]) == kinds
    assert record["name"] == "bare torch, 5-way"
    record["seconds"] = dict(zip(kinds, ([4.0], [4.0], [2.0], [6.0], [4.0]), strict=True))
    rows = list(speed_report._schedule_rows([record]))
    each = "| bare torch, 5-way | 1.000 | 0.500 | 1.500 | 1.000 |"
    assert rows[0].startswith(f"{each} the paper's")
    assert rows[0].endswith("| 0.800 (0.800 to 0.800) | ≤ 0.850 | met |")
    assert rows[1].startswith(f"{each} the demo's")
    assert rows[1].endswith("| 1.025 (1.025 to 1.025) | ≤ 0.950 | **missed** |")


def test_layouts() -> None:
    small = replace(problems.PROBLEMS["Conv4-64 5-way"], tasks=1, steps=1, threads=1)
    record = compare.layouts("5-way", small, rounds=1)
    layouts = ["MAML", "MAML++", "MAML, channels_last", "MAML++, channels_last"]
    assert list(record["seconds"]) == layouts
    record["seconds"] = dict(zip(layouts, ([4.0], [3.0], [5.0], [2.0]), strict=True))
    # Each as a share of MAML; then the faster MAML++ by the faster MAML, 2 / 4.
    row = "| 5-way | 1.000 | 0.750 | 1.250 | 0.500 | 0.500 (0.500 to 0.500) |"
    assert speed_report._layout_row(record) == row
    _, (images, *_) = replace(small, channels_last=True).prepare()
    assert images[0].stride() == (784, 1, 28, 1)  # though its memory is that of [N, C, H, W]


def test_channels_last_is_for_images() -> None:
    with pytest.raises(ValueError, match=r"images \[C, H, W\], got inputs of shape \(20,\)"):
        replace(TINY, channels_last=True)


def test_reference_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a checkout of AntreasAntoniou/HowToTrain"):
        reference.contender(reference.THEIRS, tmp_path)
    flags = compare.make_parser().parse_args(["--reference=elsewhere", "--only=reference"])
    assert compare.command(flags) == (
        "python benchmarks/compare.py --reference PATH --only reference"
    )


def test_reference_must_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = dict.fromkeys(reference.OURS, 1.5)
    monkeypatch.setattr(
        reference, "contender", lambda name, *rest: lambda: losses.get(name, losses["theirs"])
    )
    losses["theirs"] = 1.5
    (record,) = compare.time_reference(Path(), rounds=1, threads=1)
    assert list(record["seconds"]) == [*reference.OURS, reference.THEIRS]
    losses["theirs"] = 1.6
    with pytest.raises(RuntimeError, match="the iterations do not compute the same"):
        list(compare.time_reference(Path(), rounds=1, threads=1))


def test_our_side_of_the_reference() -> None:
    """Every step's loss counts, and weights and rates are trained."""
    model, batch = Question("problems:conv4_leaky", (1, 28, 28), tasks=1, threads=1).prepare()
    ours = reference.Ours(model, batch)
    assert ours() > 0
    assert all(p.grad is not None for p in ours.net.parameters())
    assert (ours.lslr.rates.grad != 0).all()
    assert all(
        layer.weight.grad.any(dim=1).all() for layer in ours.net if hasattr(layer, "num_steps")
    )


def test_the_profile_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    profile_iteration.main(["--tasks=1", "--threads=1", "--repeats=1", "--first-order"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    for row in rows:
        convolutions, *others, everything, tensors = map(float, row.split("|")[2:-1])
        assert convolutions > 0
        assert tensors > 1
        assert convolutions + sum(others) == pytest.approx(everything, abs=0.31)  # rounded
