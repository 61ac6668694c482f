"""MAML++ with torch.func: a loop of one's own, and a whole batch of tasks at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mamlpp_ext as mpp

STEPS = 3


def one_task(
    net: nn.Module, lslr: mpp.LSLR, x: Tensor, y: Tensor, second_order: bool
) -> list[Tensor]:
    params: dict[str, Tensor] = dict(net.named_parameters())
    losses: list[Tensor] = []
    for step in mpp.inner_steps(net, STEPS, second_order=second_order):
        support = F.cross_entropy(functional_call(net, params, (x,)), y)
        wanted = [params[name] for name in lslr.names]
        grads = torch.autograd.grad(support, wanted, create_graph=second_order)
        params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
        losses.append(F.cross_entropy(functional_call(net, params, (x,)), y))
    return losses


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def is_body(name: str) -> bool:
    return name.startswith("0.")


def batches(net: nn.Module, lslr: mpp.LSLR, msl: mpp.MultiStepLoss) -> mpp.TaskBatchResult:
    x, y = torch.randn(2, 4, 3), torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    result = mpp.task_batch_loss(
        net,
        lslr,
        (x, y, x, y),
        smoothed,
        num_steps=STEPS,
        aggregate=msl,
        second_order=True,
        rematerialize=True,
        chunk_size=1,
        all_step_losses=False,
    )
    torch.autograd.backward(result.loss)
    meta_loss = mpp.TaskBatchLoss(net, lslr, F.cross_entropy, num_steps=STEPS, aggregate=msl)
    found: mpp.TaskBatchResult = meta_loss(x, y, x, y, second_order=False)
    torch.autograd.backward(found.loss)
    return found


def main() -> float:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net = mpp.convert_batchnorm(plain, STEPS)
    lslr = mpp.LSLR(net, STEPS, adapt=is_body, learnable=False)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=2), mpp.DerivativeOrderAnnealing(1)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    torch.autograd.backward(msl(one_task(net, lslr, x, y, da.second_order)))
    weights: Tensor = mpp.multi_step_loss_weights(STEPS, epoch=0, anneal_epochs=2)
    torch.testing.assert_close(weights, msl.weights)
    found = batches(net, lslr, msl)
    assert found.step_losses.shape == (2, STEPS)
    with torch.no_grad(), mpp.at_step(net, STEPS - 1):
        logits: Tensor = net(x)
    assert logits.shape == (4, 2)
    return found.loss.item()
