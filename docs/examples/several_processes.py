"""MAML++ on several processes, one for each GPU or CPU core, each with its share of the tasks.

    torchrun --standalone --nproc-per-node 2 docs/examples/several_processes.py

Gradients and running statistics are those of one process with all tasks. When one process dies,
torchrun ends the others; the same command then goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import mamlpp_ext as mpp
from few_shot import Batch, TaskSampler, conv_net, load, task_accuracies

WAYS, SHOTS, TARGETS, TASKS, STEPS = 5, 1, 5, 8, 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains until all epochs are done."""
    flags = _flags(arguments)
    device = join()
    torch.manual_seed(0)
    data = load(flags.data)
    tasks = TaskSampler(data.train, WAYS, SHOTS, TARGETS, TASKS)  # the same in every process
    net = mpp.convert_batchnorm(conv_net(1, WAYS, flags.filters, data.train.shape[-1]), STEPS)
    net.to(device)
    lslr = mpp.LSLR(net, STEPS, lr=0.1)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    meta_loss = mpp.TaskBatchLoss(
        net, lslr, F.cross_entropy, num_steps=STEPS, aggregate=msl, process_group=dist.group.WORLD
    )
    parallel = DistributedDataParallel(meta_loss)
    meta_opt = torch.optim.Adam(meta_loss.parameters(), lr=1e-3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, flags.epochs, eta_min=1e-5)
    parts = {"meta_loss": meta_loss, "meta_opt": meta_opt, "annealing": annealing}
    parts |= {"msl": msl, "da": da, "tasks": tasks}

    for epoch in range(resume(parts, flags.checkpoint), flags.epochs):
        for _ in range(flags.iterations):
            meta_opt.zero_grad()
            batch = share_of(tasks.sample(), device)
            parallel(*batch, second_order=da.second_order).loss.backward()
            meta_opt.step()
        msl.step(), da.step(), annealing.step()
        test_tasks = TaskSampler(data.test, WAYS, SHOTS, TARGETS, TASKS, seed=1)
        accuracy = evaluate(meta_loss, [test_tasks.sample() for _ in range(flags.test_batches)])
        if dist.get_rank() == 0:
            save(parts, epoch + 1, flags.checkpoint)
            print(f"epoch {epoch}: accuracy {100 * accuracy:.1f} %", flush=True)
    dist.barrier()  # gloo may abort a process that leaves while another still works
    dist.destroy_process_group()


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MAML++ on several processes; see the file's top")
    parser.add_argument("--data", help="Omniglot, as in demo.py; without, the digits")
    parser.add_argument("--checkpoint", type=Path, default=Path("several_processes.pt"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20, help="of an epoch")
    parser.add_argument("--test-batches", type=int, default=13, help="of 8 tasks, every epoch")
    parser.add_argument("--filters", type=int, default=32)
    return parser.parse_args(arguments)


def join() -> torch.device:
    """Joins the processes that torchrun started; returns this one's device."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    return device


def share_of(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """Returns this process's tasks, as many as every other's and in the order of the ranks."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    return tuple(part.tensor_split(processes)[rank].to(device) for part in batch)


@torch.no_grad()
def evaluate(meta_loss: mpp.TaskBatchLoss, batches: list[Batch]) -> float:
    """Returns the accuracy on all tasks, by batch statistics; each process takes its share."""
    right = meta_loss.lslr.rates.new_zeros(2)
    with mpp.frozen_statistics(meta_loss):
        for batch in batches:
            share = share_of(batch, right.device)
            accuracies = task_accuracies(meta_loss(*share).logits, share[-1])
            right += torch.stack([accuracies.sum(), accuracies.new_tensor(len(accuracies))])
    dist.all_reduce(right)
    return float(right[0] / right[1])


def save(parts: dict[str, Any], epoch: int, path: Path) -> None:
    """Writes the state aside, then in place of the last one: never half a checkpoint."""
    aside = path.with_suffix(".part")
    torch.save({"epoch": epoch} | {name: part.state_dict() for name, part in parts.items()}, aside)
    os.replace(aside, path)


def resume(parts: dict[str, Any], path: Path) -> int:
    """Loads the last checkpoint, if there is one, and returns the epoch to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["epoch"])


if __name__ == "__main__":
    main()
