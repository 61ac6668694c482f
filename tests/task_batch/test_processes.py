"""Two processes on gloo equal one with all the tasks, and what goes wrong between them is said."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mamlpp_ext as mpp

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without gloo", allow_module_level=True)

PROCESSES, STEPS, ITERATIONS = 2, 3, 2
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@dataclasses.dataclass(frozen=True)
class Case:
    """What differs from the plain setting."""

    tasks: int = 4
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    momentum: float | None = 0.1


CASES = {
    "plain": Case(),
    "a task each": Case(tasks=2),
    "chunks": Case(options={"chunk_size": 1}),
    "rematerialised": Case(options={"rematerialize": True}),
    "needed losses only": Case(options={"all_step_losses": False, "aggregate": None}),
    "averages": Case(momentum=None),
}
DTYPES = {"float32": (torch.float32, 1e-6), "float64": (torch.float64, 1e-10)}
ORDERS = {"first": False, "second": True}
SETTINGS = list(itertools.product(CASES, DTYPES, ORDERS))


def meta_loss_of(case: Case, dtype: torch.dtype, group: Any = None) -> mpp.TaskBatchLoss:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=case.momentum), nn.ReLU(), nn.Linear(4, 2)
    net = mpp.convert_batchnorm(nn.Sequential(*layers), STEPS).to(dtype)
    options = {"aggregate": mpp.MultiStepLoss(STEPS, anneal_epochs=9)} | case.options
    return mpp.TaskBatchLoss(
        net, mpp.LSLR(net, STEPS), F.cross_entropy, num_steps=STEPS, process_group=group, **options
    )


def batch_of(tasks: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    drawn = torch.Generator().manual_seed(1)
    x = [torch.randn(tasks, n, 3, generator=drawn, dtype=dtype) for n in (5, 6)]
    y = [torch.randint(2, (tasks, n), generator=drawn) for n in (5, 6)]
    return x[0], y[0], x[1], y[1]


def share_of(batch: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    return tuple(part.tensor_split(PROCESSES)[rank] for part in batch)


def trained(
    meta_loss: mpp.TaskBatchLoss, forward: nn.Module, batch: tuple[Tensor, ...], second_order: bool
) -> dict[str, Tensor]:
    """Returns every gradient, parameter, rate and running statistic after some iterations."""
    meta_opt = torch.optim.SGD(meta_loss.parameters(), lr=0.1)
    for _ in range(ITERATIONS):
        meta_opt.zero_grad()
        forward(*batch, second_order=second_order).loss.backward()
        meta_opt.step()
    found = {f"gradient of {name}": p.grad for name, p in meta_loss.named_parameters()}
    return found | dict(meta_loss.named_parameters()) | dict(meta_loss.named_buffers())


def in_a_process(rank: int, folder: str) -> None:
    """Runs every setting and fault, and writes down what comes out."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {}
    for name, dtype, order in SETTINGS:
        case = CASES[name]
        meta_loss = meta_loss_of(case, DTYPES[dtype][0], dist.group.WORLD)
        parallel = DistributedDataParallel(meta_loss)
        batch = share_of(batch_of(case.tasks, DTYPES[dtype][0]), rank)
        result = trained(meta_loss, parallel, batch, ORDERS[order])
        found[f"{name}, {dtype}, {order}"] = {key: t.detach() for key, t in result.items()}
    found |= {check.__name__: check(rank) for check in (unequal, alone, outsider, half)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # the store's file goes with the first process that leaves
    dist.destroy_process_group()


def error_of(meta_loss: mpp.TaskBatchLoss, batch: tuple[Tensor, ...]) -> str:
    """Returns what it raises, and whether statistics came to harm."""
    before = [buffer.clone() for buffer in meta_loss.buffers()]
    try:
        meta_loss(*batch)
    except ValueError as error:
        torch.testing.assert_close(list(meta_loss.buffers()), before)
        return str(error)
    return "nothing raised"


def unequal(rank: int) -> str:
    meta_loss = meta_loss_of(Case(), torch.float32, dist.group.WORLD)
    return error_of(meta_loss, batch_of(2 + rank, torch.float32))


def outsider(rank: int) -> str:
    group = dist.new_group([0])  # rank 1 gets a placeholder
    return error_of(meta_loss_of(Case(), torch.float32, group), batch_of(2, torch.float32))


@torch.no_grad()
def alone(rank: int) -> list[float]:
    """Rank 1 evaluates in both ways while rank 0 does nothing: to wait would be for ever."""
    meta_loss = meta_loss_of(Case(), torch.float32, dist.group.WORLD)
    if rank == 0:
        return []
    with mpp.frozen_statistics(meta_loss):
        by_batch = meta_loss(*batch_of(2, torch.float32)).loss
    by_running = meta_loss.eval()(*batch_of(2, torch.float32)).loss
    return [float(by_batch), float(by_running)]


def half(rank: int) -> dict[str, Tensor]:
    """Statistics under bfloat16 autocast, and of float16 and float32 layers side by side."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        meta_loss = meta_loss_of(Case(), torch.float32, dist.group.WORLD)
        with torch.autocast("cpu", dtype):
            meta_loss(*share_of(batch_of(4, torch.float32), rank))
        found |= {f"{dtype} {name}": buffer for name, buffer in meta_loss.named_buffers()}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; they are started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_a_process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("name", "dtype", "order"), SETTINGS)
def test_two_processes_equal_one(
    found: list[dict[str, Any]], name: str, dtype: str, order: str
) -> None:
    case, (kind, tolerance) = CASES[name], DTYPES[dtype]
    meta_loss = meta_loss_of(case, kind)
    want = trained(meta_loss, meta_loss, batch_of(case.tasks, kind), ORDERS[order])
    assert any("running_var" in key for key in want)
    assert all(want[key].abs().sum() > 0 for key in want if "rates" in key)
    for got in found:
        torch.testing.assert_close(
            got[f"{name}, {dtype}, {order}"],
            {key: t.detach() for key, t in want.items()},
            rtol=0,
            atol=tolerance,
        )


def test_unequal_numbers_of_tasks_are_refused(found: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(found):
        assert "got 2 to 3 tasks" in got["unequal"]
        assert f"here {2 + rank}" in got["unequal"]
        assert "a multiple of the number of processes" in got["unequal"]


def test_a_process_outside_the_group_is_refused(found: list[dict[str, Any]]) -> None:
    inside, outside = (got["outsider"] for got in found)
    assert inside == "nothing raised"
    assert "not in process_group" in outside


def test_one_process_evaluates_alone(found: list[dict[str, Any]]) -> None:
    assert len(found[1]["alone"]) == 2


def test_statistics_of_half_precision(found: list[dict[str, Any]]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        meta_loss = meta_loss_of(Case(), torch.float32)
        with torch.autocast("cpu", dtype):
            meta_loss(*batch_of(4, torch.float32))
        for got in found:
            for name, buffer in meta_loss.named_buffers():
                torch.testing.assert_close(got["half"][f"{dtype} {name}"], buffer)


# ---------------------------------------------------------------------------------------------
# The example under torchrun.

DYING = """
import os, signal, sys
import few_shot, several_processes

sample, drawn = few_shot.TaskSampler.sample, []

def dying_sample(sampler):
    drawn.append(sampler)
    if os.environ["RANK"] == "1" and len(drawn) == 5:  # in the second epoch, of 2 + 1 batches each
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(sampler)

few_shot.TaskSampler.sample = dying_sample
several_processes.main(sys.argv[1:])
"""
TINY = ("--epochs=3", "--iterations=2", "--test-batches=1", "--filters=4")


def start(script: Path, checkpoint: Path) -> subprocess.Popen[str]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}")
    return subprocess.Popen(
        [sys.executable, *torchrun, script, *TINY, f"--checkpoint={checkpoint}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, EXAMPLES.parents[1]))),
            "OMP_NUM_THREADS": "1",
        },
    )


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """Returns what a checkpoint holds by its place, all but texts."""
    if isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in pairs for k, v in leaves(value, f"{path}/{key}").items()}
    return {} if state is None or isinstance(state, str) else {path: state}


def test_a_dead_process_ends_the_others_and_a_restart_goes_on(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    dying = tmp_path / "dying.py"
    dying.write_text(DYING)
    runs = [start(EXAMPLES / "several_processes.py", undisturbed), start(dying, killed)]
    # communicate returns when the last process that has the pipe is gone
    (shown, errors), (shown_killed, errors_killed) = (run.communicate(timeout=500) for run in runs)
    assert runs[0].returncode == 0, errors
    assert [line.split(":")[0] for line in shown.splitlines()] == ["epoch 0", "epoch 1", "epoch 2"]

    assert runs[1].returncode != 0
    assert "Signal 9 (SIGKILL) received" in errors_killed
    assert "rank      : 1" in errors_killed
    assert [line.split(":")[0] for line in shown_killed.splitlines()] == ["epoch 0"]

    run = start(EXAMPLES / "several_processes.py", killed)
    shown_again, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    assert shown_killed + shown_again == shown
    want, got = (leaves(torch.load(p, weights_only=True)) for p in (undisturbed, killed))
    assert want["/epoch"] == 3
    assert sum(isinstance(value, Tensor) for value in want.values()) > 50
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dying.py",
        "killed.pt",
        "undisturbed.pt",
    ]
