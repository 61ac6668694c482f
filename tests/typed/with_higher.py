"""MAML++ in higher's form: training, a checkpoint of everything, evaluation with more steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import mamlpp_ext as mpp
from mamlpp_ext.integrations.higher import DifferentiableLSLR, LSLROptimizer, innerloop_ctx

STEPS = 3
Task = tuple[Tensor, Tensor, Tensor, Tensor]


class Learner:
    """What is trained, and the schedules of its training."""

    def __init__(self, epochs: int) -> None:
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        self.net: nn.Module = mpp.convert_batchnorm(
            nn.Sequential(*layers), STEPS, extra_steps="last"
        )
        self.lslr = mpp.LSLR(self.net, STEPS, lr=0.1, extra_steps="last")
        self.msl = mpp.MultiStepLoss(STEPS, anneal_epochs=2)
        self.da = mpp.DerivativeOrderAnnealing(first_order_epochs=1)
        learned = [*self.net.parameters(), *self.lslr.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(learned, lr=1e-3)
        self.annealing: LRScheduler = CosineAnnealingLR(self.optimizer, epochs, eta_min=1e-5)

    def findings(self) -> list[str]:
        return mpp.check_setup(
            self.net,
            self.lslr,
            self.optimizer,
            multi_step_loss=self.msl,
            derivative_order=self.da,
            meta_scheduler=self.annealing,
        )

    def end_epoch(self) -> None:
        self.msl.step()
        self.da.step()
        self.annealing.step()


def step_losses(
    learner: Learner, fnet: nn.Module, diffopt: DifferentiableLSLR, task: Task
) -> list[Tensor]:
    x_support, y_support, x_target, y_target = task
    losses: list[Tensor] = []
    for _ in mpp.inner_steps(fnet, STEPS):
        diffopt.step(F.cross_entropy(fnet(x_support), y_support))
        losses.append(F.cross_entropy(fnet(x_target), y_target))
    return losses


def train(learner: Learner, tasks: Iterable[Task]) -> float:
    learner.optimizer.zero_grad()
    total = 0.0
    for task in tasks:
        second_order: bool = learner.da.second_order
        with innerloop_ctx(learner.net, learner.lslr, second_order=second_order) as (fnet, diffopt):
            loss = learner.msl(step_losses(learner, fnet, diffopt, task))
            torch.autograd.backward(loss)
            total += loss.item()
    learner.optimizer.step()
    return total


def evaluate(learner: Learner, task: Task, steps: int) -> Tensor:
    """Predicts with batch statistics, with more steps than were trained."""
    net, lslr = learner.net, learner.lslr
    with mpp.frozen_statistics(net):
        with innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
            for _ in mpp.inner_steps(fnet, steps):
                diffopt.step(F.cross_entropy(fnet(task[0]), task[1]))
            logits: Tensor = fnet(task[2])
            return logits.detach()


def save(learner: Learner, path: Path) -> None:
    states = {
        "net": learner.net.state_dict(),
        "lslr": learner.lslr.state_dict(),
        "msl": learner.msl.state_dict(),
        "da": learner.da.state_dict(),
    }
    torch.save(states, path)


def load(learner: Learner, path: Path) -> None:
    states = torch.load(path, weights_only=True)
    learner.net.load_state_dict(states["net"])
    learner.lslr.load_state_dict(states["lslr"])
    learner.msl.load_state_dict(states["msl"])
    learner.da.load_state_dict(states["da"])


def rows(learner: Learner) -> dict[str, Tensor]:
    """What has a row or a column for every step."""
    norm = learner.net.get_submodule("1")
    assert isinstance(norm, mpp.PerStepBatchNorm2d)
    assert norm.weight is not None
    assert norm.running_mean is not None
    return {"weight": norm.weight, "mean": norm.running_mean, **learner.lslr.rates_at(0)}


def main(folder: Path) -> list[str]:
    learner = Learner(epochs=2)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    for _ in range(2):
        train(learner, [(x, y, x, y)])
        learner.end_epoch()
    save(learner, folder / "states.pt")
    again = Learner(epochs=2)
    load(again, folder / "states.pt")
    for name, table in rows(again).items():
        torch.testing.assert_close(table, rows(learner)[name])
    assert evaluate(again, (x, y, x, y), steps=STEPS + 2).shape == (4, 2)
    by_hand = LSLROptimizer(again.net, again.lslr, second_order=False)
    assert len(by_hand.param_groups) == 1
    return again.findings()
