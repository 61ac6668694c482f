"""The scripts of docs/examples: they run, and what they say of themselves is so."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import few_shot
from learners import PARTS, Learner, Schedules

EXAMPLES = Path(few_shot.__file__).parent
BACKENDS = ("higher", "torchopt", "torch_func")
TINY = ["--filters=8", "--eval-tasks=8", "--curve-tasks=4", "--eval-targets=5", "--threads=1"]


def start_demo(out: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, EXAMPLES / "demo.py", *TINY, "--out", out, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])},
    )


def check_record(out: Path) -> dict[str, Any]:
    """The picture is a picture, and the JSON has no NaN and all that the table is made of."""
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 1000

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} in demo.json")

    record = json.loads((out / "demo.json").read_text(), parse_constant=refuse)
    for name in ("MAML", "MAML++"):
        result = record["results"][name]
        assert result["curve"]
        assert result["history"]
        for statistics in ("batch_statistics", "running_statistics"):
            assert 0 <= result[statistics]["accuracy"] <= 1
            assert result[statistics]["tasks"] >= 4
    return record


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo(backend: str, tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--minutes=0.02", f"--backend={backend}")
    table, progress = demo.communicate(timeout=300)
    assert demo.returncode == 0, progress
    for heading in ("iterations", "ms/iteration", "batch statistics", "running statistics"):
        assert heading in table
    assert "meta rate" in progress
    assert "iteration" in progress
    record = check_record(tmp_path)
    assert record["settings"]["backend"] == backend
    plain, plus = record["results"]["MAML"], record["results"]["MAML++"]
    assert plain["iterations"] > 0
    assert plus["iterations"] > 0
    assert len(plus["history"]) == 100
    assert plus["history"][0]["loss_weights"] == pytest.approx([0.2] * 5)
    assert plus["history"][-1]["loss_weights"] == [0, 0, 0, 0, 1]
    assert len({rate for rates in plus["rates"].values() for rate in rates}) > 1
    assert all(rates == pytest.approx([0.1] * 5) for rates in plain["rates"].values())
    assert [finding for finding in plus["setup"] if not finding.startswith("on:")] == []


def make_learner(*parts: str, backend: str = "torchopt") -> Learner:
    torch.manual_seed(0)
    schedules = Schedules(4, 2, 2, 1e-3, 1e-5)
    net = few_shot.conv_net(1, 5, 4, 8)
    return Learner(net, parts, backend, steps=2, inner_lr=0.1, schedules=schedules)


def sampler() -> few_shot.TaskSampler:
    return few_shot.TaskSampler(few_shot.load().train, 5, 1, 3, tasks=2)


def learned(learner: Learner) -> list[torch.Tensor]:
    return [*learner.net.state_dict().values(), learner.lslr.rates]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_part_changes_what_it_should(backend: str) -> None:
    seen = {}
    for parts in [(), *((part,) for part in PARTS), PARTS]:
        learner, tasks = make_learner(*parts, backend=backend), sampler()
        for _ in range(3):
            learner.train_on(tasks.sample())
            learner.end_epoch()
        assert (len(learner.lslr.rates.unique()) > 1) == ("LSLR" in parts)
        assert (learner.meta_lr < 1e-3) == ("CA" in parts)
        seen[parts] = learner.net.head.weight.detach().clone()
    for one, other in itertools.combinations(seen.values(), 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("parts", [(), PARTS])
def test_backends_train_alike(parts: tuple[str, ...]) -> None:
    heads, means = [], []
    for backend in BACKENDS:
        learner, tasks = make_learner(*parts, backend=backend), sampler()
        for _ in range(4):
            learner.train_on(tasks.sample())
            learner.end_epoch()
        heads.append(learner.net.head.weight)
        means.append(learner.net.norm1.running_mean.flatten())
    for head in heads[1:]:
        torch.testing.assert_close(head, heads[0], atol=1e-4, rtol=1e-3)
    # No loss depends on a bias in front of a batch norm: what reaches it is rounding, of which Adam
    # makes steps of up to its rate, 1e-3 in each of the 4 iterations.
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], atol=4e-3, rtol=0)
    assert means[0].abs().sum() > 0


@pytest.mark.parametrize("parts", [(), PARTS])
def test_evaluation_leaves_no_trace(parts: tuple[str, ...]) -> None:
    learner = make_learner(*parts)
    learner.train_on(sampler().sample())
    before = copy.deepcopy(learned(learner))
    by_batch, by_running = learner.accuracies([sampler().sample()])
    assert by_batch.shape == by_running.shape == (2,)
    assert learner.net.training
    torch.testing.assert_close(learned(learner), before, rtol=0, atol=0)


def test_learner_goes_on_from_its_state() -> None:
    one, other, tasks = make_learner(*PARTS), make_learner(*PARTS), sampler()
    one.train_on(tasks.sample())
    one.end_epoch()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    batch = tasks.sample()
    assert one.train_on(batch) == other.train_on(batch)
    torch.testing.assert_close(learned(one), learned(other), rtol=0, atol=0)


def test_interrupted_demo_writes_what_it_has(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, "--minutes=0.5", "--backend=torchopt")
    assert demo.stderr is not None
    assert any("iteration" in line for line in iter(demo.stderr.readline, ""))  # it trains
    demo.send_signal(signal.SIGINT)
    table, errors = demo.communicate(timeout=300)
    assert demo.returncode == 0, errors
    assert "Interrupted." in table
    results = check_record(tmp_path)["results"]
    assert all(result["interrupted"] and result["seconds"] < 30 for result in results.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=nowhere.npz"], "no data at nowhere.npz"),
        (["--ways=13"], "13 ways need as many classes, there are 12"),
        (["--shots=170"], "170 shots and 5 targets need 175 drawings"),
        (["--first-order=-1"], "--first-order must be 0 to 100 (%), got -1"),
        (["--minutes=0"], "--minutes must be above 0"),
        (["--backend=jax"], "invalid choice: 'jax'"),
    ],
)
def test_demo_refuses(flags: list[str], message: str, tmp_path: Path) -> None:
    demo = start_demo(tmp_path, *flags)
    _, errors = demo.communicate(timeout=300)
    assert demo.returncode == 2
    assert message in errors
    assert "Traceback" not in errors


def test_digits_are_split_by_digit() -> None:
    data = few_shot.load()
    assert data.train.shape == (7, 174, 8, 8)
    assert data.test.shape == (3, 174, 8, 8)
    assert data.train.max() == 255


def omniglot_folder(root: Path) -> Path:
    """Two alphabets with 1204 characters of two drawings: ink in the top left corner."""
    for alphabet, count in (("images_background/Greek", 1000), ("images_evaluation/Angelic", 204)):
        for number in range(count):
            folder = root / alphabet / f"character{number:04}"
            folder.mkdir(parents=True)
            for drawing in range(2):
                page = Image.new("1", (105, 105), 1)
                page.paste(0, (0, 0, 50, 50))
                page.save(folder / f"{drawing}.png")
    return root


def test_folder_of_drawings(tmp_path: Path) -> None:
    data = few_shot.load(omniglot_folder(tmp_path))
    assert data.train.shape == (1150, 2, 28, 28)
    assert (len(data.val), len(data.test)) == (50, 4)
    assert data.train[0, 0, 0, 0] == 255  # ink is high, paper is 0
    assert data.train[0, 0, -1, -1] == 0


def test_archive(tmp_path: Path) -> None:
    images = np.arange(1300 * 4, dtype=np.uint32).astype(np.uint8).reshape(1300, 1, 2, 2)
    np.savez(tmp_path / "some.npz", images=images)
    data = few_shot.load(tmp_path / "some.npz")
    parts = torch.cat([data.train, data.val, data.test])
    assert sorted(parts.flatten(1).tolist()) == sorted(images.reshape(1300, 4).tolist())


def test_too_few_characters(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['pictures'\], expected an array named 'images'"):
        few_shot.load(tmp_path / "other.npz")
    Image.new("1", (105, 105)).save(characters(tmp_path) / "1.png")
    with pytest.raises(ValueError, match=r"holds 1 folders named character.*Omniglot has 1623"):
        few_shot.load(tmp_path)


def characters(root: Path) -> Path:
    folder = root / "Greek" / "character01"
    folder.mkdir(parents=True)
    return folder


def test_sampler_goes_on_from_its_state() -> None:
    sampler, other = (
        few_shot.TaskSampler(few_shot.load().train, 5, 1, 3, tasks=2, seed=seed) for seed in (0, 1)
    )
    sampler.sample()
    other.load_state_dict(sampler.state_dict())
    for ours, theirs in zip(sampler.sample(), other.sample(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sampler_labels_turns_of_one_character() -> None:
    corner = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    corner[..., 0, 0] = 255  # its four turns differ in where the ink is
    x_support, y_support, x_target, y_target = few_shot.TaskSampler(corner, 4, 1, 3, 2).sample()
    assert x_support.shape == (2, 4, 1, 2, 2)
    assert x_target.shape == (2, 12, 1, 2, 2)
    for task in range(2):
        inked = x_support[task].flatten(1).argmax(1)
        assert sorted(inked.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(x_target[task].flatten(1).argmax(1), inked[y_target[task]])
        assert y_support[task].tolist() == [0, 1, 2, 3]


def test_interval() -> None:
    mean, interval = few_shot.mean_and_interval(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert mean == 0.5
    assert interval == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
