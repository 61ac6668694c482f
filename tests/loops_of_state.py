"""Inner loops of two steps, through the adapters and by plain torch, for what a forward leaves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

STEPS = 2


def in_higher(net: nn.Module, lslr: mpp.LSLR, x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(F.mse_loss(fnet(x), y))
        return F.mse_loss(fnet(x), y)


def in_torchopt(net: nn.Module, lslr: mpp.LSLR, x: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    with mpp_torchopt.innerloop_ctx(net, lslr) as inner_opt:
        for _ in range(steps):
            inner_opt.step(F.mse_loss(net(x), y))
        return F.mse_loss(net(x), y)


def in_place_of_all(net: nn.Module, lslr: mpp.LSLR, x: Tensor, y: Tensor) -> Tensor:
    """Plain torch: weights put in their place, the net as it is."""
    own = [(module._parameters, dict(module._parameters)) for module in net.modules()]
    params: dict[str, Tensor] = dict(net.named_parameters())
    try:
        for step in range(STEPS):
            loss = F.mse_loss(net(x), y)
            grads = torch.autograd.grad(loss, [*params.values()], create_graph=True)
            for i, ((name, p), g) in enumerate(zip(params.items(), grads, strict=True)):
                params[name] = p - lslr.rates[i, step] * g
                path, _, place = name.rpartition(".")
                net.get_submodule(path)._parameters[place] = params[name]  # type: ignore[assignment]
        return F.mse_loss(net(x), y)
    finally:
        for parameters, before in own:
            parameters.update(before)


PATHS = {"higher": in_higher, "torchopt": in_torchopt}
