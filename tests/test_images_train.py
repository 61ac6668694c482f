"""Images of one's own in the demonstration and the ablation: layouts, presets, the ensemble."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ablation
import demo
import few_shot
from ablation_protocol import PRESETS, Protocol
from ablation_run import AblationRun
from learners import PARTS, Learner, Schedules
from test_ablation import finish, start
from test_examples import check_record, start_demo
from test_image_data import archives, class_folders, one_archive
from test_image_files import folders
from training import Run

TINY = ["--ways=3", "--filters=4", "--targets=1", "--eval-targets=1", "--minutes=0.003"]


def parts_of_folders(root: Path) -> Path:
    return folders(root / "photos")


def classes_alone(root: Path) -> Path:
    return class_folders(root / "classes", [f"class {number}" for number in range(25)])


def archives_by_part(root: Path) -> Path:
    return archives(root / "archives")


def archive_with_parts(root: Path) -> Path:
    return one_archive(root / "one.npz")


LAYOUTS = [parts_of_folders, classes_alone, archives_by_part, archive_with_parts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_trains_in_the_demonstration(layout: Any, tmp_path: Path) -> None:
    flags = [*TINY, f"--data={layout(tmp_path)}", "--eval-tasks=4", "--curve-tasks=4", "--flip"]
    settings, _, data = demo.read_flags(demo.make_parser(), flags)
    assert (settings.tasks, settings.flip, settings.meta_lr) == (4, True, 3e-3)
    run = Run(True, settings, data, threading.Event(), lambda *_: None)
    run.train()
    results = run.results()
    assert results["iterations"] > 0
    assert results["batch_statistics"]["tasks"] == 4
    assert run.learner.net.conv1.in_channels == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_trains_in_the_ablation(layout: Any, tmp_path: Path) -> None:
    flags = ablation.make_parser().parse_args([f"--data={layout(tmp_path)}", "--flip"])
    data = ablation.read_data(flags)
    assert flags.preset == "cifar-fs-reduced"
    sizes = {"ways": 3, "filters": 4, "epochs": 2, "iterations": 1, "val_every": 1, "steps": 2}
    tasks = {"targets": 1, "eval_targets": 1, "val_tasks": 2, "test_tasks": 2, "tasks": 2}
    protocol = replace(ablation.read_protocol(flags), **sizes, **tasks)
    assert protocol.flip
    run = AblationRun("MAML++", 0, protocol, few_shot.load(flags.data), tmp_path / "run")
    run.run(checkpoint_seconds=60)
    assert [r["kind"] for r in run.records] == ["validation", "validation", "test"]
    assert run.records[-1]["data"] == data.title


def test_demonstration_with_a_folder(tmp_path: Path) -> None:
    root = folders(tmp_path / "photos")
    (root / "val" / "val-1" / "1.png").write_text("no image")
    (root / "val" / "empty").mkdir()
    run = start_demo(tmp_path / "out", *TINY, f"--data={root}", "--size=16", "--cache")
    text, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    read = "read photos, 16x16, colour: train 5 classes (15 images), val 5 classes (14 images)"
    assert text.startswith(read)
    assert "skipped 1 unreadable file (val/val-1/1.png: not an image)" in text
    assert "skipped 1 class (val/empty): no readable image" in text
    assert f"kept in {tmp_path / 'photos.decoded-16.npy'}" in text
    assert "MAML++ is" in text
    record = check_record(tmp_path / "out")
    assert record["data"].startswith(read)
    assert record["settings"]["size"] == 16
    assert "pillow" in record["versions"]


def test_ablation_with_archives(tmp_path: Path) -> None:
    data = archives(tmp_path / "data")
    flags = (
        "--preset=cifar-fs-reduced",
        "--rows",
        "MAML",
        "--seeds=0",
        "--ensemble=2",
        "--clamp=1",
    )
    run = start(data, tmp_path / "out", *flags, "--targets=1", "--eval-targets=1")
    code, table, errors = finish(run)
    assert code == 0, errors
    assert "read set, 12x12, colour: train 10 classes (30 images), val 5" in errors
    first, _, third = table.splitlines()[:3]
    assert first.startswith(
        "set, 12x12, colour, 3-way 1-shot, 4 filters, 2 tasks an iteration of 1"
    )
    assert "inner rate 0.01, meta-gradients within ±1, 2 inner steps" in first
    assert "Ensemble: the 2 models that validated best, the means of their logits" in third
    assert "| row | batch statistics | running statistics | ensemble |" in table
    assert "paper" not in table.splitlines()[4]
    records = (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()
    test = json.loads(records[-1])
    assert len(test["ensemble"]["epochs"]) == 2
    assert test["picked_epoch"] == test["ensemble"]["epochs"][0]


REFUSED = [
    (
        ["--ways=6", "--targets=1", "--eval-targets=1"],
        "6 ways need as many classes, there are 5 in",
    ),
    (
        ["--ways=5", "--targets=1"],
        "1 shots and 15 targets need 16 images of each class in train: ",
    ),
    (["--size=4"], "at least 8x8 is needed"),
    (["--size=0"], "--size must be above 0, got 0"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
@pytest.mark.parametrize("program", ["demo", "ablation"])
def test_refused_in_both(program: str, flags: list[str], message: str, tmp_path, capsys) -> None:
    flags = [*flags, f"--data={folders(tmp_path / 'photos')}"]
    main = {
        "demo": lambda: demo.read_flags(demo.make_parser(), flags),
        "ablation": lambda: ablation.main([*flags, f"--out={tmp_path / 'out'}"]),
    }
    with pytest.raises(SystemExit, match="2"):
        main[program]()
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_a_message(tmp_path, monkeypatch, capsys) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("photos: Permission denied")

    monkeypatch.setattr(demo, "load", refuse)
    with pytest.raises(SystemExit, match="2"):
        demo.read_flags(demo.make_parser(), ["--data=photos"])
    assert "photos: Permission denied" in capsys.readouterr().err


def test_presets() -> None:
    def preset(name: str, *flags: str) -> Protocol:
        return ablation.read_protocol(
            ablation.make_parser().parse_args(["--data=x", f"--preset={name}", *flags])
        )

    mini = preset("paper-mini-imagenet-5way-1shot")
    assert (mini.ways, mini.shots, mini.targets, mini.tasks) == (5, 1, 15, 2)
    assert (mini.filters, mini.steps, mini.inner_lr, mini.clamp) == (48, 5, 0.01, 10)
    assert (mini.epochs, mini.iterations, mini.multi_step_loss, mini.first_order) == (
        100,
        500,
        15,
        50,
    )
    assert (mini.meta_lr, mini.final_meta_lr, mini.size) == (1e-3, 1e-5, 84)
    assert preset("paper-mini-imagenet-5way-5shot") == replace(mini, shots=5)
    cifar = preset("cifar-fs-5way-1shot")
    assert (cifar.filters, cifar.tasks, cifar.epochs * cifar.iterations) == (32, 4, 60_000)
    assert cifar.size is None
    assert preset("cifar-fs-5way-5shot") == replace(cifar, shots=5)
    reduced = preset("cifar-fs-reduced")
    assert (reduced.filters, reduced.tasks, reduced.epochs * reduced.iterations) == (32, 2, 600)
    assert len(reduced.rows()) == 8
    changed = preset("cifar-fs-reduced", "--clamp=5", "--ensemble=5", "--flip", "--size=16")
    assert changed == replace(reduced, clamp=5.0, ensemble=5, flip=True, size=16)
    assert all(not p.flip and not p.ensemble for p in PRESETS.values())


def test_clamp_bounds_the_networks_meta_gradients_alone() -> None:
    torch.manual_seed(0)
    tasks = few_shot.TaskSampler(few_shot.load().train, 5, 1, 3, tasks=2)
    schedules = Schedules(4, 2, 0, 1e-3, 1e-5)
    net = few_shot.conv_net(1, 5, 4, 8)
    options = {"steps": 2, "inner_lr": 0.1, "schedules": schedules}
    learner = Learner(net, PARTS, "torchopt", **options, clamp=1e-3)
    learner.train_on(tasks.sample())
    grads = torch.cat([p.grad.flatten() for p in learner.net.parameters()])
    assert grads.abs().max() == pytest.approx(1e-3)
    assert learner.lslr.rates.grad.abs().max() > 1e-3


def test_ensemble_averages_logits_of_the_best_models(tmp_path: Path, monkeypatch) -> None:
    protocol = Protocol(
        ways=3,
        filters=4,
        epochs=4,
        iterations=1,
        val_every=1,
        val_tasks=2,
        test_tasks=3,
        ensemble=2,
    )
    run = AblationRun("MAML++", 0, protocol, few_shot.load(), tmp_path)
    given, found = [], []
    predictions = run._predictions

    def noted(images, count, seed):
        logits, labels = predictions(images, count, seed)
        if seed == 2:
            given.append((logits, labels))
        return logits, labels

    monkeypatch.setattr(run, "_predictions", noted)
    run.run(checkpoint_seconds=60)
    found = run.records[-1]
    accuracies = sorted((r["batch_statistics"]["accuracy"] for r in run.records[:-1]), reverse=True)
    assert [model["accuracy"] for model in run.best] == accuracies[:2]
    (second, labels), (best, _) = given  # the best model is the last one
    for place, name in enumerate(("batch_statistics", "running_statistics")):
        alone = (best[place].argmax(-1) == labels).float().mean().item()
        together = ((best + second)[place].argmax(-1) == labels).float().mean().item()
        assert found[name]["accuracy"] == pytest.approx(alone)
        assert found["ensemble"][name]["accuracy"] == pytest.approx(together)
    assert found["ensemble"]["epochs"] == [model["epoch"] for model in run.best]
    assert (tmp_path / "checkpoint.pt").stat().st_size < 1e6


def test_a_checkpoint_from_before_the_ensemble_goes_on(tmp_path: Path) -> None:
    protocol = Protocol(
        ways=3, filters=4, epochs=2, iterations=1, val_every=1, val_tasks=2, test_tasks=2
    )
    run = AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path / "whole")
    run.run(60)
    half = AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path / "half")
    half._iterate()
    half._end_epoch()
    half._validate()
    half._save()
    checkpoint = tmp_path / "half" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    (state["best"],) = state["best"]
    for name in ("clamp", "ensemble", "size", "flip"):
        del state["who"][name]
    torch.save(state, checkpoint)
    again = AblationRun("MAML", 0, protocol, few_shot.load(), tmp_path / "half")
    again.run(60)
    strip = ("seconds",)
    assert [{k: v for k, v in r.items() if k not in strip} for r in again.records] == [
        {k: v for k, v in r.items() if k not in strip} for r in run.records
    ]
