"""MAML and MAML++ with each of the three libraries underneath: one meta-iteration of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR

import mamlpp_ext as mpp
from few_shot import Batch, task_accuracies


@dataclass(frozen=True)
class Schedules:
    """When the annealed parts of MAML++ end, in epochs, and the meta rates.

    Attributes:
        epochs: in the whole training.
        multi_step_loss: until only the final step's loss counts.
        first_order: until meta-gradients are second-order.
        plain_meta_lr: plain MAML's, constant.
        meta_lr: MAML++'s at the start.
        final_meta_lr: MAML++'s at the end.
    """

    epochs: int
    multi_step_loss: int
    first_order: int
    plain_meta_lr: float
    meta_lr: float
    final_meta_lr: float


class Learner:
    """Plain MAML or full MAML++ around a network.

    Args:
        net: a network with ``nn.BatchNorm`` layers.
        plus: whether to switch the six parts of MAML++ on.
        backend: ``"higher"``, ``"torchopt"`` or ``"torch_func"``.
        steps: inner steps.
        inner_lr: the inner rate, for MAML++ the one it starts from.
        schedules: the lengths of what MAML++ anneals, and the meta rate of both.
    """

    def __init__(
        self,
        net: nn.Module,
        plus: bool,
        backend: str,
        *,
        steps: int,
        inner_lr: float,
        schedules: Schedules,
    ) -> None:
        self.plus, self.steps, self.inner_lr = plus, steps, inner_lr
        self.run = BACKENDS[backend]
        if plus:
            net = mpp.convert_batchnorm(net, steps)  # BNRS and BNWB
        elif backend == "torch_func":
            net = mpp.convert_batchnorm(
                net, 1, extra_steps="last"
            )  # a BatchNorm that vmap can take
        self.net = net
        self.lslr = mpp.LSLR(  # LSLR
            net, steps, inner_lr, learnable=plus, adapt=None if plus else ["*"]
        )
        self.msl = (  # MSL
            mpp.MultiStepLoss(steps, schedules.multi_step_loss) if plus else mpp.FinalStepLoss()
        )
        self.da = mpp.DerivativeOrderAnnealing(schedules.first_order if plus else 0)  # DA
        learned = [p for p in (*net.parameters(), *self.lslr.parameters()) if p.requires_grad]
        meta_lr = schedules.meta_lr if plus else schedules.plain_meta_lr
        self.meta_opt = torch.optim.Adam(learned, meta_lr)
        self.meta_rate = (  # CA
            CosineAnnealingLR(self.meta_opt, schedules.epochs, schedules.final_meta_lr)
            if plus
            else ConstantLR(self.meta_opt, factor=1.0)
        )

    def train_on(self, batch: Batch) -> float:
        """One meta-iteration; returns the meta-loss."""
        self.meta_opt.zero_grad()
        loss, _ = self.run(self, batch, train=True)
        self.meta_opt.step()
        return loss

    def end_epoch(self) -> None:
        """Moves every schedule to the next epoch."""
        self.msl.step()
        self.da.step()
        self.meta_rate.step()

    def accuracies(self, batches: Iterable[Batch], running: bool) -> Tensor:
        """Returns the accuracy on each task, which leaves no trace in the network.

        Args:
            batches: tasks.
            running: whether batch norm uses its running statistics, or the batch's (the paper's
                way, in which the target images of a task help each other).
        """
        mode = nullcontext() if running else mpp.frozen_statistics(self.net)
        self.net.train(not running)
        with mode:
            found = [
                task_accuracies(self.run(self, batch, train=False)[1], batch[3])
                for batch in batches
            ]
        self.net.train()
        return torch.cat(found)

    @property
    def meta_lr(self) -> float:
        """The present meta rate."""
        return float(self.meta_opt.param_groups[0]["lr"])

    def loss_weights(self) -> list[float]:
        """The present weight of each inner step's target loss."""
        if isinstance(self.msl, mpp.MultiStepLoss):
            return [float(weight) for weight in self.msl.weights]
        return [0.0] * (self.steps - 1) + [1.0]

    def counts(self, step: int) -> bool:
        """Says whether the target loss after this inner step enters the meta-loss."""
        return self.loss_weights()[step] > 0

    def description(self) -> dict[str, Any]:
        """What it has learned of rates, and which parts of MAML++ are on."""
        rates = self.lslr.rates.detach().tolist()
        return {
            "rates": dict(zip(self.lslr.names, rates, strict=True)),
            "setup": mpp.check_setup(
                self.net,
                self.lslr,
                self.meta_opt,
                multi_step_loss=self.msl,
                derivative_order=self.da,
                meta_scheduler=self.meta_rate,
            ),
        }


def _with_higher(learner: Learner, batch: Batch, train: bool) -> tuple[float, Tensor]:
    return _task_by_task(learner, batch, train, _higher_loop)


def _with_torchopt(learner: Learner, batch: Batch, train: bool) -> tuple[float, Tensor]:
    return _task_by_task(learner, batch, train, _torchopt_loop)


def _with_torch_func(learner: Learner, batch: Batch, train: bool) -> tuple[float, Tensor]:
    with torch.set_grad_enabled(train):
        result = mpp.task_batch_loss(
            learner.net,
            learner.lslr,
            batch,
            F.cross_entropy,
            num_steps=learner.steps,
            aggregate=learner.msl,
            second_order=learner.da.second_order,
        )
    if train:
        result.loss.backward()
    return result.loss.item(), result.logits


def _task_by_task(learner: Learner, batch: Batch, train: bool, loop: Loop) -> tuple[float, Tensor]:
    tasks = len(batch[0])
    total, all_logits = 0.0, []
    for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
        with loop(learner, train) as (net, inner_opt):
            losses = []
            for step in mpp.inner_steps(net, learner.steps):
                inner_opt.step(F.cross_entropy(net(x_support), y_support))
                if not learner.counts(step):
                    continue  # plain MAML, and multi-step loss once annealed, look once
                with torch.set_grad_enabled(train):
                    logits = net(x_target)
                    losses.append(F.cross_entropy(logits, y_target))
            loss = (learner.msl(losses) if len(losses) > 1 else losses[0]) / tasks
            if train:
                loss.backward()
        total += loss.item()
        all_logits.append(logits.detach())
    return total, torch.stack(all_logits)


@contextmanager
def _higher_loop(learner: Learner, train: bool) -> Iterator[tuple[nn.Module, Any]]:
    import higher

    from mamlpp_ext.integrations.higher import innerloop_ctx

    if learner.plus:
        context = innerloop_ctx(
            learner.net,
            learner.lslr,
            second_order=learner.da.second_order,
            track_higher_grads=train,
        )
    else:
        context = higher.innerloop_ctx(
            learner.net,
            torch.optim.SGD(learner.net.parameters(), learner.inner_lr),
            copy_initial_weights=not train,
            track_higher_grads=train,
        )
    with context as (net, inner_opt):
        yield net, inner_opt


@contextmanager
def _torchopt_loop(learner: Learner, train: bool) -> Iterator[tuple[nn.Module, Any]]:
    import torchopt

    from mamlpp_ext.integrations.torchopt import innerloop_ctx

    if learner.plus:
        second_order = learner.da.second_order and train
        with innerloop_ctx(learner.net, learner.lslr, second_order=second_order) as inner_opt:
            yield learner.net, inner_opt
        return
    start = torchopt.extract_state_dict(learner.net, by="reference", with_buffers=False)
    yield learner.net, torchopt.MetaSGD(learner.net, lr=learner.inner_lr)
    torchopt.recover_state_dict(learner.net, start)


Loop = Callable[[Learner, bool], AbstractContextManager[tuple[nn.Module, Any]]]
BACKENDS: dict[str, Callable[..., tuple[float, Tensor]]] = {
    "higher": _with_higher,
    "torchopt": _with_torchopt,
    "torch_func": _with_torch_func,
}
