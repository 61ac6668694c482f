"""``python -m mamlpp_ext.benchmark``: its loops compute the same, and it says what it measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mamlpp_ext.benchmark import __main__ as command
from mamlpp_ext.benchmark import loops, measure
from mamlpp_ext.benchmark.loops import (
    BATCHED,
    GRAPH,
    LEARNERS,
    LOOPS,
    MetaIteration,
    available_loops,
    make_learner,
)
from mamlpp_ext.benchmark.question import Question, memory_and_time
from mamlpp_ext.task_batch import module as task_batch_module

MODELS = """
import torch
from torch import nn

def conv():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )

normed = nn.Sequential(
    nn.Linear(3, 4),
    nn.Unflatten(1, (2, 2)),
    nn.InstanceNorm1d(2, track_running_stats=True),
    nn.Flatten(),
    nn.Linear(4, 5),
)
frozen = nn.Linear(3, 5).requires_grad_(False)
narrow = nn.Linear(3, 2)

hard = nn.Sequential(nn.Linear(3, 5), nn.Hardsigmoid())

class Pair(nn.Linear):
    def __init__(self):
        super().__init__(3, 5)

    def forward(self, x):
        return super().forward(x), x

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        if mask.dtype == torch.bool and not mask.any():  # no vmap goes through
            raise ValueError("everything is masked")
        words = self.words(ids) * mask[..., None]
        return {"logits": self.head(words.mean(1)), "words": words}

def sentences(examples):
    mask = torch.rand(2, examples, 5) < 0.7
    return {"ids": torch.randint(7, (2, examples, 5)), "mask": mask}

def batch():
    labels = torch.arange(3).expand(2, 3)
    return sentences(3), labels, sentences(3), labels"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bench_models", raising=False)


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes seconds to start; one test starts them."""

    def at_once(function: Any, *arguments: Any, seconds: float) -> Any:
        return measure.Memory(1_000_000, 3_000_000), 0.1

    monkeypatch.setattr(command, "in_fresh_process", at_once)


def gradient_of(
    loop: str, learner: str, second_order: bool, **how: bool
) -> tuple[torch.Tensor, ...]:
    """Returns the loss, the meta-gradient of weights and rates, and the running means."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )
    labels = torch.arange(3).expand(2, -1), torch.arange(3).repeat(2).expand(2, -1)
    batch = (torch.randn(2, 3, 1, 6, 6), labels[0], torch.randn(2, 6, 1, 6, 6), labels[1])
    one = MetaIteration(
        loop, make_learner(model, learner, loop, steps=3, second_order=second_order, **how), batch
    )
    loss = one.gradient()
    rates = one.learner.lslr.rates
    grads = [p.grad.flatten() for p in one.learner.net.parameters()]
    norm: Any = one.learner.net[1]
    if learner == "MAML++":
        grads.append(rates.grad.flatten())
    else:
        assert rates.grad is None
    return loss, torch.cat(grads), norm.running_mean.flatten()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_loop_computes_the_same(learner: str, second_order: bool) -> None:
    expected = gradient_of("bare torch", learner, second_order)
    for loop in available_loops():
        loss, grads, means = gradient_of(loop, learner, second_order)
        torch.testing.assert_close((loss, grads), expected[:2], rtol=1e-9, atol=1e-12)
        if (loop, learner) == ("higher", "MAML"):  # higher loses the statistics
            assert not means.any()
        else:
            torch.testing.assert_close(means, expected[2], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("second_order", [True, False])
def test_every_loop_computes_the_same_multi_step_loss(second_order: bool) -> None:
    expected = gradient_of("bare torch", "MAML++", second_order, multi_step=True)
    for loop in available_loops():
        found = gradient_of(loop, "MAML++", second_order, multi_step=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    last = gradient_of("bare torch", "MAML++", second_order)
    assert (expected[0] - last[0]).abs() > 1e-4
    plain = (gradient_of("bare torch", "MAML", second_order, multi_step=m) for m in (True, False))
    torch.testing.assert_close(*plain)  # has none


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("loop", available_loops())
def test_the_orders_differ(loop: str, learner: str) -> None:
    first, second = (gradient_of(loop, learner, order)[1] for order in (False, True))
    assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("loop", "rematerialized"), [("task_batch_loss", False), ("rematerialised", True)]
)
def test_memory_options_arrive(
    loop: str, rematerialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither changes what is computed."""
    seen: dict[str, Any] = {}
    real = task_batch_module.task_batch_loss
    monkeypatch.setattr(
        task_batch_module,
        "task_batch_loss",
        lambda *args, **flags: seen.update(flags) or real(*args, **flags),
    )
    batch = torch.randn(3, 2, 4), torch.arange(2).expand(3, -1)
    learner = make_learner(nn.Linear(4, 2), "MAML++", loop, steps=1, chunk_size=2)
    MetaIteration(loop, learner, batch * 2)()
    assert (seen["rematerialize"], seen["chunk_size"]) == (rematerialized, 2)


def test_only_the_cuda_graph_asks_for_one() -> None:
    learner = make_learner(nn.Linear(4, 2), "MAML++", GRAPH, steps=1)
    assert [loop for loop in BATCHED if loops.batch_module(loop, learner).cuda_graph] == [GRAPH]


@pytest.mark.usefixtures("float64")
def test_a_meta_iteration() -> None:
    """It trains a copy, weights and rates, by its own gradient alone."""
    model, batch = nn.Linear(2, 3), (torch.randn(1, 3, 2), torch.arange(3)[None]) * 2
    one = MetaIteration("bare torch", make_learner(model, "MAML++", "bare torch", steps=1), batch)
    net, rates = one.learner.net, one.learner.lslr.rates
    net.weight.grad = torch.full((3, 2), 100.0)  # left over
    one()
    assert net.weight.grad.abs().max() < 10
    moved = (net.weight - model.weight).abs().max().item()
    assert moved == pytest.approx(1e-3, rel=1e-3)  # Adam's step
    assert (rates != 0.1).all()


class Siamese(nn.Module):
    """Two inputs, in a batch norm, and several outputs, named."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        both = self.norm(self.body(left)), self.norm(self.body(right))
        near, _ = self.attention(*[torch.stack(both, 1)] * 3, need_weights=False)
        return {"distance": (near[:, 0] - near[:, 1]).square().sum(-1), "left": both[0]}


def contrast(output: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    apart = output["distance"] - labels["distance"]
    return apart.square().mean() + output["left"].square().mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("learner", LEARNERS)
def test_every_loop_takes_trees(learner: str, named: bool, second_order: bool) -> None:
    """Inputs by position or name, outputs and labels by name; attention has both orders."""
    torch.manual_seed(0)
    model = Siamese()

    def examples(count: int) -> tuple[Any, Any]:
        x = torch.randn(2, count, 4), torch.randn(2, count, 4)
        labels = {"distance": torch.rand(2, count)}
        return dict(zip(("left", "right"), x, strict=True)) if named else x, labels

    batch = (*examples(8), *examples(6))
    found = {}
    for loop in available_loops():
        made = make_learner(
            model, learner, loop, steps=2, second_order=second_order, loss_fn=contrast
        )
        loss = MetaIteration(loop, made, batch).gradient()
        found[loop] = loss, torch.cat([p.grad.flatten() for p in made.net.parameters()])
    for loop, result in found.items():
        torch.testing.assert_close(result, found["bare torch"], rtol=1e-9, atol=1e-10, msg=loop)
    assert 1e-2 < found["bare torch"][1].abs().max() < 1e2


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = measure.alternate(runs, rounds=2)
    assert calls == ["a", "b"] * 3  # the first of each warms up
    assert [len(found) for found in seconds.values()] == [2, 2]


def test_stopwatch_and_ratio() -> None:
    assert measure.stopwatch(lambda: time.sleep(0.01)) >= 0.01
    assert measure.ratio([2, 3, 8, 2], [1, 1, 2, 4]) == (2.5, 1.625, 3.25)
    assert measure.ratio([1], [2]) == (0.5, 0.5, 0.5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_is_that_of_the_process_itself() -> None:
    """ru_maxrss would start from what this process has."""
    much = bytearray(700_000_000)
    assert measure.peak_bytes() > len(much)
    assert measure.in_fresh_process(measure.peak_bytes, seconds=60) < len(much)


def test_memory_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: its peak begins anew."""
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    assert measure.in_this_process(max, 1, 2) == 2
    assert reset == [0, 1]


def test_fresh_processes_that_do_not_report() -> None:
    with pytest.raises(TimeoutError, match=r"not done within 0\.05 seconds; allow more"):
        measure.in_fresh_process(time.sleep, 30, seconds=0.05)
    with pytest.raises(RuntimeError, match="ended with exit code 3 before it reported"):
        measure.in_fresh_process(os._exit, 3, seconds=60)


@pytest.mark.usefixtures("models")
def test_memory_of_an_iteration() -> None:
    question = Question("bench_models:conv", (1, 8, 8), tasks=2, steps=2, threads=1)
    memory, seconds = measure.in_fresh_process(
        memory_and_time, question, "MAML++", "task_batch_loss", seconds=120
    )
    assert memory.peak > memory.before > 0
    assert memory.increase == memory.peak - memory.before
    assert seconds > 0


FLAGS = ["--tasks=2", "--steps=2", "--repeats=1", "--threads=1"]


@pytest.mark.usefixtures("models", "no_children")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench_models:conv", "--shape=1,8,8", "--json", *FLAGS]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = {(r["learner"], r["loop"]): r for r in found["results"]}
    assert set(measured) == {(learner, loop) for learner in LEARNERS for loop in available_loops()}
    for result in measured.values():
        assert len(result["seconds"]) == 1
        assert result["seconds"][0] > 0
        assert (result["bytes_before"], result["bytes_peak"]) == (1_000_000, 3_000_000)
    assert found["question"]["second_order"] is True
    assert {"torch", "higher", "torchopt", "mamlpp_ext"} == set(found["versions"])


@pytest.mark.usefixtures("models", "no_children")
def test_a_loop_that_refuses_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench_models:normed", "--shape=3", "--first-order", *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5-way 1-shot, 1 targets a class, inputs 3, 2 inner steps, 2 tasks")
    assert "first order; cpu, 1 threads" in lines[0]
    rows = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| ")}
    assert set(rows) == {f"| {name}" for name in ("loop", "bare torch", "higher", "torchopt")}
    assert rows["| higher"][5] == "2 (3)"
    for learner in LEARNERS:
        for loop in ("task_batch_loss", "rematerialised"):
            (line,) = [ln for ln in lines if ln.startswith(f"{learner} in {loop} was refused")]
            assert "layer '2' (InstanceNorm1d) keeps running statistics, which vmap" in line


@pytest.mark.usefixtures("models", "no_children")
def test_a_batch_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["bench_models:Tokens", "--batch=bench_models:batch", "--steps=2", "--repeats=1"]
    assert command.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tasks of bench_models:batch, 2 inner steps, second order; cpu")
    rows = {line.split(" | ")[0] for line in lines if line.startswith("| ")}
    assert rows == {f"| {name}" for name in ("loop", "bare torch", "higher", "torchopt")}
    (line,) = [ln for ln in lines if ln.startswith("MAML++ in task_batch_loss was refused")]
    assert "data-dependent control flow" in line
    assert line.endswith("pass --chunk-size 1 to run the tasks one by one")

    assert command.main([*flags, "--chunk-size=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = {(r["learner"], r["loop"]) for r in found["results"] if "refused" not in r}
    assert measured == {(learner, loop) for learner in LEARNERS for loop in available_loops()}


def test_table_divides_as_it_says() -> None:
    seconds = {
        ("MAML", "bare torch"): [4.0, 4.0, 4.0],
        ("MAML", "higher"): [2.0, 2.0, 4.0],
        ("MAML++", "bare torch"): [3.0, 3.0, 3.0],
        ("MAML++", "higher"): [1.0, 1.0, 1.0],
        ("MAML++", "task_batch_loss"): [0.5, 0.5, 0.5],
    }
    answer = {
        "question": vars(Question("any:where", (3,))),
        "threads": 2,
        "versions": {"torch": "2"},
        "results": [
            {"learner": c[0], "loop": c[1], "seconds": s, "bytes_before": 0, "bytes_peak": 10**7}
            for c, s in seconds.items()
        ],
    }
    lines = command.table(answer).splitlines()
    assert "MAML++ / MAML in higher" in lines[2]  # the fastest loop of plain MAML
    assert lines[4].startswith(
        "| bare torch | 4000.0 | 3000.0 | 0.75 (0.75 to 0.75) | 1.50 (1.12 to 1.50) |"
    )
    assert lines[6].startswith("| task_batch_loss | - | 500.0 | - | 0.25 (0.19 to 0.25) | - | 10 (")


def test_only_installed_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loops.available_loops("cuda:0") == list(LOOPS)
    assert loops.available_loops() == [loop for loop in LOOPS if loop != GRAPH]
    real = importlib.util.find_spec
    monkeypatch.setattr(loops, "find_spec", lambda name: None if name == "higher" else real(name))
    assert loops.available_loops() == [
        "bare torch",
        "torchopt",
        "task_batch_loss",
        "rematerialised",
    ]


@pytest.mark.usefixtures("models", "no_children")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench_models"], "neither --shape nor --batch is given"),
        (["bench_models", "--shape=3"], "'bench_models' is not of the form package.module:name"),
        (["bench_models:conv", "--shape=a"], "whole numbers of at least 1 with commas between"),
        (["bench_models:conv", "--shape=1,8,8", "--ways=6"], "shape (6, 5) for 6 inputs, the"),
        (["bench_models:narrow", "--shape=3"], "needs logits [5, 5 or more]; give it that many"),
        (["bench_models:Pair", "--shape=3"], "the model returned a tuple, the benchmark needs"),
        (["bench_models:frozen", "--shape=3"], "adapt pattern '*' matches no parameter"),
        (["bench_models:conv", "--shape=1,8,8", "--tasks=0"], "tasks must be at least 1, got 0"),
        (["bench_models:conv", "--shape=1,8,8", "--repeats=0"], "--repeats must be at least 1"),
        (["bench_models:conv", "--shape=3", "--device=cuda"], "torch finds no GPU; use 'cpu', or"),
        (["bench_models:conv", "--shape=3"], "Expected 3D (unbatched) or 4D"),
        (["bench_models:Tokens", "--shape=3"], "missing 1 required positional argument: 'mask'; g"),
        (["bench_models:hard", "--shape=3"], "first order (--first-order), or use F.relu6(x + 3)"),
        (["bench_models:conv", "--batch=bench_models:batch"], "does not take the x_support of --b"),
        (["bench_models:conv", "--batch=bench_models:batch", "--shape=3"], "leave one of them out"),
        (
            ["bench_models:conv", "--batch=bench_models:hard"],
            "bench_models:hard is a Sequential; name",
        ),
    ],
)
def test_refuses(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
