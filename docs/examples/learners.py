"""MAML, MAML++ and anything between, with each of the three libraries underneath."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR

import mamlpp_ext as mpp
from few_shot import Batch, task_accuracies

# MAML++ is all of them: multi-step loss, derivative-order annealing, per-step batch norm
# (statistics, weights and biases), learned inner rates, cosine annealing of the meta rate.
PARTS = ("MSL", "DA", "BNRS+BNWB", "LSLR", "CA")

# By which the targets are normalised, in the order of Learner.accuracies.
STATISTICS = ("batch_statistics", "running_statistics")


@dataclass(frozen=True)
class Schedules:
    """When the annealed parts of MAML++ end, in epochs, and the meta rates.

    Attributes:
        epochs: in the whole training.
        multi_step_loss: until only the final step's loss counts.
        first_order: until meta-gradients are second-order.
        meta_lr: the meta rate, or where cosine annealing starts.
        final_meta_lr: where it ends.
    """

    epochs: int
    multi_step_loss: int
    first_order: int
    meta_lr: float
    final_meta_lr: float


class Learner:
    """MAML around a network, with the parts of MAML++ that are asked for.

    Args:
        net: a network with norm layers of torch's, on the device where it learns.
        parts: some of ``PARTS``; none is plain MAML, all are MAML++.
        backend: ``"higher"``, ``"torchopt"`` or ``"torch_func"``.
        steps: inner steps.
        inner_lr: the inner rate, with LSLR the one it starts from.
        schedules: the lengths of what is annealed, and the meta rate.
        clamp: bound of each value of the network's meta-gradients; None for none.
    """

    def __init__(
        self,
        net: nn.Module,
        parts: Collection[str],
        backend: str,
        *,
        steps: int,
        inner_lr: float,
        schedules: Schedules,
        clamp: float | None = None,
    ) -> None:
        self.plain, self.steps, self.inner_lr, self.clamp = not parts, steps, inner_lr, clamp
        self.run = BACKENDS[backend]
        adapt = None
        if "BNRS+BNWB" in parts:
            net = mpp.convert_norm(net, steps)
        elif backend == "torch_func" and any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
            # nn.BatchNorm's meaning, in a layer that vmap can take.
            net, adapt = mpp.convert_batchnorm(net, 1, extra_steps="last"), ["*"]
        self.net = net
        self.lslr = mpp.LSLR(net, steps, inner_lr, learnable="LSLR" in parts, adapt=adapt)
        self.msl = mpp.MultiStepLoss(steps, schedules.multi_step_loss if "MSL" in parts else 0)
        self.da = mpp.DerivativeOrderAnnealing(schedules.first_order if "DA" in parts else 0)
        self.meta_loss = mpp.TaskBatchLoss(  # what backend "torch_func" runs
            net,
            self.lslr,
            F.cross_entropy,
            num_steps=steps,
            aggregate=self.msl,
            all_step_losses=False,  # as the loops below
            cuda_graph=next(net.parameters()).is_cuda,
        )
        learned = [p for p in (*net.parameters(), *self.lslr.parameters()) if p.requires_grad]
        self.meta_opt = torch.optim.Adam(learned, schedules.meta_lr)
        self.meta_rate = (
            CosineAnnealingLR(self.meta_opt, schedules.epochs, schedules.final_meta_lr)
            if "CA" in parts
            else ConstantLR(self.meta_opt, factor=1.0)
        )

    def train_on(self, batch: Batch) -> float:
        """One meta-iteration; returns the meta-loss."""
        self.meta_opt.zero_grad()
        loss = self.run(self, batch)
        if self.clamp is not None:
            # The authors' code does so for Mini-ImageNet, with the network's and not the rates'.
            torch.nn.utils.clip_grad_value_(self.net.parameters(), self.clamp)
        self.meta_opt.step()
        return loss

    def end_epoch(self) -> None:
        """Moves every schedule to the next epoch."""
        self.msl.step()
        self.da.step()
        self.meta_rate.step()

    def accuracies(self, batches: Iterable[Batch]) -> Tensor:
        """Returns the accuracies of :meth:`predictions`, [2, number of tasks]."""
        logits, labels = self.predictions(batches)
        return torch.stack([task_accuracies(by, labels) for by in logits])

    def predictions(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Adapts to tasks and predicts their targets, which leaves no trace in the network.

        The support images are normalised by their own statistics, as in training. The targets are
        predicted twice: by the statistics of all targets of the task together (the paper's way, in
        which they help each other), and each by itself, by the running statistics.

        Returns:
            Logits [2, number of tasks, Q, ways], with batch and with running statistics, and labels
            [number of tasks, Q].
        """
        logits, labels = [], []
        for batch in batches:
            for *images, y_target in zip(*batch, strict=True):
                logits.append(self._predict(*images))
                labels.append(y_target)
        return torch.stack(logits, dim=1), torch.stack(labels)

    def _predict(self, x_support: Tensor, y_support: Tensor, x_target: Tensor) -> Tensor:
        params = {name: p.detach().requires_grad_() for name, p in self.net.named_parameters()}
        with mpp.frozen_statistics(self.net):
            for step in mpp.inner_steps(self.net, self.steps):
                logits = functional_call(self.net, params, x_support)
                wanted = {name: params[name] for name in self.lslr.names}
                grads = torch.autograd.grad(F.cross_entropy(logits, y_support), [*wanted.values()])
                grads = dict(zip(wanted, grads, strict=True))
                params = self.lslr.update(params, grads, step)
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
            with torch.no_grad():
                by_batch = functional_call(self.net, params, x_target)
        self.net.eval()
        with torch.no_grad():
            by_running = functional_call(self.net, params, x_target)
        self.net.train()
        return torch.stack([by_batch, by_running])

    @property
    def meta_lr(self) -> float:
        """The present meta rate."""
        return float(self.meta_opt.param_groups[0]["lr"])

    def loss_weights(self) -> list[float]:
        """The present weight of each inner step's target loss."""
        return [float(weight) for weight in self.msl.weights]

    def counts(self, step: int) -> bool:
        """Says whether the target loss after this inner step counts."""
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

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state_dict[name])

    def _stateful(self) -> dict[str, Any]:
        names = ("net", "lslr", "msl", "da", "meta_opt", "meta_rate")
        return {name: getattr(self, name) for name in names}


def _with_torch_func(learner: Learner, batch: Batch) -> float:
    loss = learner.meta_loss(*batch, second_order=learner.da.second_order).loss
    loss.backward()
    return loss.item()


def _task_by_task(learner: Learner, batch: Batch, loop: Loop) -> float:
    total = 0.0
    for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
        with loop(learner) as (net, inner_opt):
            losses = []
            for step in mpp.inner_steps(net, learner.steps):
                inner_opt.step(F.cross_entropy(net(x_support), y_support))
                if learner.counts(step):  # without multi-step loss, or once annealed: the last one
                    losses.append(F.cross_entropy(net(x_target), y_target))
            loss = (learner.msl(losses) if len(losses) > 1 else losses[0]) / len(batch[0])
            loss.backward()
        total += loss.item()
    return total


@contextmanager
def _higher_loop(learner: Learner) -> Iterator[tuple[nn.Module, Any]]:
    from mamlpp_ext.integrations.higher import innerloop_ctx

    # For plain MAML too: higher's own context would lose the running statistics.
    second_order = learner.da.second_order
    with innerloop_ctx(learner.net, learner.lslr, second_order=second_order) as (net, inner_opt):
        yield net, inner_opt


@contextmanager
def _torchopt_loop(learner: Learner) -> Iterator[tuple[nn.Module, Any]]:
    import torchopt

    from mamlpp_ext.integrations.torchopt import innerloop_ctx

    if not learner.plain:
        second_order = learner.da.second_order
        with innerloop_ctx(learner.net, learner.lslr, second_order=second_order) as inner_opt:
            yield learner.net, inner_opt
        return
    start = torchopt.extract_state_dict(learner.net, by="reference", with_buffers=False)
    yield learner.net, torchopt.MetaSGD(learner.net, lr=learner.inner_lr)
    torchopt.recover_state_dict(learner.net, start)


Loop = Callable[[Learner], AbstractContextManager[tuple[nn.Module, Any]]]
BACKENDS: dict[str, Callable[[Learner, Batch], float]] = {
    "higher": partial(_task_by_task, loop=_higher_loop),
    "torchopt": partial(_task_by_task, loop=_torchopt_loop),
    "torch_func": _with_torch_func,
}
