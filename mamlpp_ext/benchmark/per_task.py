"""Plain MAML and MAML++ task by task, as each library's own users write them.

All compute the target loss of the final inner step alone, so that MAML and MAML++ do the same
number of forwards; MAML++ those of all steps if it is asked for a multi-step loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.check_setup.model import arguments_of
from mamlpp_ext.lslr import LSLR, functional_call
from mamlpp_ext.schedules import FinalStepLoss, MultiStepLoss
from mamlpp_ext.steps import inner_steps
from mamlpp_ext.task_batch import Loss


class TaskLoss(NamedTuple):
    """The target loss after adaptation to one task.

    Attributes:
        loss: of shape [].
        cut_off: the adapted weights, where the loop cut them off the initial ones: in first order
            their gradients are the initial weights' own. Otherwise empty, and ``loss.backward()``
            reaches the initial weights.
    """

    loss: Tensor
    cut_off: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Learner:
    """What a loop adapts, and how.

    Attributes:
        net: plain MAML's own network, or the converted one.
        lslr: the rates; plain MAML's are fixed, and only ``task_batch_loss`` reads them.
        plain: whether it is plain MAML.
        second_order: whether to differentiate through the inner gradients.
        lr: plain MAML's inner rate.
        aggregate: what makes one loss of those of the steps, in MAML++ alone.
        chunk_size: how many tasks ``task_batch_loss`` takes at once; None for all.
        loss_fn: of an output and labels.
    """

    net: nn.Module
    lslr: LSLR
    plain: bool
    second_order: bool
    lr: float
    aggregate: MultiStepLoss | FinalStepLoss
    chunk_size: int | None = None
    loss_fn: Loss = F.cross_entropy

    def loss(self, model: Callable[..., Any], x: Any, labels: Any) -> Tensor:
        """Returns the loss of a model: the net, or what stands for it."""
        args, kwargs = arguments_of(x)
        return self.loss_fn(model(*args, **kwargs), labels)

    def loss_at(self, params: Mapping[str, Tensor], x: Any, labels: Any) -> Tensor:
        """Returns the loss of the net with other weights.

        Plain MAML calls it by torch's own function, MAML++ by the package's, as its guides do.
        """
        args, kwargs = arguments_of(x)
        call = torch.func.functional_call if self.plain else functional_call
        return self.loss_fn(call(self.net, dict(params), args, kwargs), labels)


# Takes inputs and labels of support and target.
TaskLoop = Callable[[Any, Any, Any, Any], TaskLoss]


def task_loop(loop: str, learner: Learner) -> TaskLoop:
    """Returns the function that adapts to one task, in a library that goes task by task."""
    return _TASK_LOOPS[loop, learner.plain](learner)


def _bare_maml(learner: Learner) -> TaskLoop:
    net, lr = learner.net, learner.lr

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        params: dict[str, Tensor] = {n: p for n, p in net.named_parameters() if p.requires_grad}
        for _ in range(learner.lslr.num_steps):
            loss = learner.loss_at(params, xs, ys)
            found = torch.autograd.grad(
                loss, list(params.values()), create_graph=learner.second_order, allow_unused=True
            )
            params = {
                name: p if grad is None else p - lr * grad
                for (name, p), grad in zip(params.items(), found, strict=True)
            }
        return TaskLoss(learner.loss_at(params, xt, yt))

    return task_loss


def _bare_maml_pp(learner: Learner) -> TaskLoop:
    net, lslr, aggregate = learner.net, learner.lslr, learner.aggregate

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        params: dict[str, Tensor] = dict(net.named_parameters())
        losses: list[Tensor | None] = [None] * lslr.num_steps
        for step in inner_steps(net, lslr.num_steps, second_order=learner.second_order):
            loss = learner.loss_at(params, xs, ys)
            adapted = [params[name] for name in lslr.names]
            found = torch.autograd.grad(
                loss, adapted, create_graph=learner.second_order, allow_unused=True
            )
            params = lslr.update(params, dict(zip(lslr.names, found, strict=True)), step)
            if aggregate.counts(step):
                losses[step] = learner.loss_at(params, xt, yt)
        return TaskLoss(aggregate(losses))

    return task_loss


def _higher_maml(learner: Learner) -> TaskLoop:
    import higher

    sgd = torch.optim.SGD(learner.net.parameters(), lr=learner.lr)
    # higher's first order: no graph through the adaptation at all, and the gradients of the adapted
    # weights are handed to the initial ones.
    tracked = learner.second_order

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        with higher.innerloop_ctx(
            learner.net, sgd, copy_initial_weights=False, track_higher_grads=tracked
        ) as (fnet, diffopt):
            for _ in range(learner.lslr.num_steps):
                diffopt.step(learner.loss(fnet, xs, ys))
            loss = learner.loss(fnet, xt, yt)
            return TaskLoss(loss, () if tracked else tuple(fnet.parameters()))

    return task_loss


def _higher_maml_pp(learner: Learner) -> TaskLoop:
    from mamlpp_ext.integrations.higher import innerloop_ctx

    net, lslr, aggregate = learner.net, learner.lslr, learner.aggregate

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        losses: list[Tensor | None] = [None] * lslr.num_steps
        with innerloop_ctx(net, lslr, second_order=learner.second_order) as (fnet, diffopt):
            for step in inner_steps(fnet, lslr.num_steps):
                diffopt.step(learner.loss(fnet, xs, ys))
                if aggregate.counts(step):
                    losses[step] = learner.loss(fnet, xt, yt)
            return TaskLoss(aggregate(losses))

    return task_loss


def _torchopt_maml(learner: Learner) -> TaskLoop:
    # MetaSGD always builds the graph of the gradients, so first order takes the functional style.
    return _torchopt_objects(learner) if learner.second_order else _torchopt_functions(learner)


def _torchopt_objects(learner: Learner) -> TaskLoop:
    import torchopt

    net = learner.net
    inner_opt = torchopt.MetaSGD(net, lr=learner.lr)
    # By reference and without buffers is the fastest way, and the one that keeps the statistics.
    weights = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    state = torchopt.extract_state_dict(inner_opt, by="reference")

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        try:
            for _ in range(learner.lslr.num_steps):
                inner_opt.step(learner.loss(net, xs, ys))
            return TaskLoss(learner.loss(net, xt, yt))
        finally:
            torchopt.recover_state_dict(net, weights)
            torchopt.recover_state_dict(inner_opt, state)

    return task_loss


def _torchopt_functions(learner: Learner) -> TaskLoop:
    import torchopt

    net, sgd = learner.net, torchopt.sgd(lr=learner.lr)

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        params = tuple(p for p in net.parameters() if p.requires_grad)
        state = sgd.init(params)
        for _ in range(learner.lslr.num_steps):
            placed: dict[str, Tensor] = dict(zip(names, params, strict=True))
            loss = learner.loss_at(placed, xs, ys)
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            updates, state = sgd.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        placed = dict(zip(names, params, strict=True))
        return TaskLoss(learner.loss_at(placed, xt, yt))

    return task_loss


def _torchopt_maml_pp(learner: Learner) -> TaskLoop:
    from mamlpp_ext.integrations.torchopt import innerloop_ctx

    net, lslr, aggregate = learner.net, learner.lslr, learner.aggregate

    def task_loss(xs: Any, ys: Any, xt: Any, yt: Any) -> TaskLoss:
        losses: list[Tensor | None] = [None] * lslr.num_steps
        with innerloop_ctx(net, lslr, second_order=learner.second_order) as inner_opt:
            for step in inner_steps(net, lslr.num_steps):
                inner_opt.step(learner.loss(net, xs, ys))
                if aggregate.counts(step):
                    losses[step] = learner.loss(net, xt, yt)
            return TaskLoss(aggregate(losses))

    return task_loss


_TASK_LOOPS: dict[tuple[str, bool], Callable[[Learner], TaskLoop]] = {
    ("bare torch", True): _bare_maml,
    ("bare torch", False): _bare_maml_pp,
    ("higher", True): _higher_maml,
    ("higher", False): _higher_maml_pp,
    ("torchopt", True): _torchopt_maml,
    ("torchopt", False): _torchopt_maml_pp,
}
