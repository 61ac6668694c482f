"""MAML++ in torchopt's form: both adapters, and the rates in a chain of transformations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torchopt.clip import clip_grad_norm

import mamlpp_ext as mpp
from mamlpp_ext.integrations.torchopt import MetaLSLR, innerloop_ctx, lslr_transform

STEPS = 3


def adapt(net: nn.Module, inner_opt: torchopt.MetaOptimizer, x: Tensor, y: Tensor) -> list[Tensor]:
    losses: list[Tensor] = []
    for _ in mpp.inner_steps(net, STEPS):
        inner_opt.step(F.cross_entropy(net(x), y))
        losses.append(F.cross_entropy(net(x), y))
    return losses


def train(
    net: nn.Module,
    lslr: mpp.LSLR,
    msl: mpp.MultiStepLoss | mpp.FinalStepLoss,
    optimizer: torch.optim.Optimizer,
    second_order: bool,
) -> Tensor:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    optimizer.zero_grad()
    with innerloop_ctx(net, lslr, second_order=second_order) as inner_opt:
        inner_opt.second_order = second_order
        loss = msl(adapt(net, inner_opt, x, y))
        torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def clipped(net: nn.Module, lslr: mpp.LSLR) -> torchopt.MetaOptimizer:
    """The same inner update behind a clipping of its gradients."""
    return torchopt.MetaOptimizer(net, torchopt.chain(clip_grad_norm(1.0), lslr_transform(lslr)))


def main() -> list[str]:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net = mpp.convert_batchnorm(plain, STEPS)
    lslr = mpp.LSLR(net, STEPS, adapt=["0.*", "2.*"])
    optimizer: torch.optim.Optimizer = torch.optim.Adam([*net.parameters(), *lslr.parameters()])
    da = mpp.DerivativeOrderAnnealing(1)
    for aggregate in (mpp.MultiStepLoss(STEPS, anneal_epochs=10), mpp.FinalStepLoss()):
        assert train(net, lslr, aggregate, optimizer, da.second_order).isfinite()
        da.step()
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    inner_opt = MetaLSLR(net, lslr, second_order=da.second_order)
    assert inner_opt.lslr is lslr
    assert len(adapt(net, inner_opt, x, y)) == STEPS
    other = mpp.convert_batchnorm(plain, STEPS)
    assert len(adapt(other, clipped(other, mpp.LSLR(other, STEPS)), x, y)) == STEPS
    return mpp.check_setup(plain, None)
