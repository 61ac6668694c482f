"""Whether a training that is wired rightly is sound: gradients, rates, losses, statistics.

What counts as unsound lies far outside of what was measured in sound trainings: meta-gradients of a
hundredth to a third of the weights' norm, rates between nothing and a few times their start, and
target losses that fall or stay with the inner steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.schedules import FinalStepLoss, MultiStepLoss
from mamlpp_ext.steps import per_step_layers

_PAGE = "docs/worse.md"
_HUGE = 10.0  # times the norm of the weights
_GROWN = 10.0  # times the rate at the start
_TURNED = -0.1  # of the rate at the start: noise about 0 is none
_RISEN = 1.25  # times the first step's target loss


def about_statistics(module: nn.Module) -> list[str]:
    """Returns which per-step layers run by running statistics, or never kept any."""
    layers = {
        name: layer
        for name, layer in per_step_layers(module).items()
        if getattr(layer, "num_batches_tracked", None) is not None
    }
    asleep = [n for n, layer in layers.items() if not (layer.training or layer.inner_step.frozen)]
    if asleep:
        return [
            f"problem: per-step layers are in eval mode ({listing(asleep)}): inner loops normalise "
            "by running statistics, and update none. Call model.train() before each inner loop; "
            "F.batch_norm(training=True) did not look at the mode, the layer does: "
            f"{_PAGE}#layers-in-eval-mode"
        ]
    if not any(p.grad is not None for p in module.parameters()):
        return []
    idle = [n for n, layer in layers.items() if not bool(layer.num_batches_tracked.any())]
    if not idle:
        return []
    return [
        f"problem: no forward has updated the running statistics of {listing(idle)}, though "
        "gradients were taken: the inner loops ran in eval mode or inside frozen_statistics (call "
        "model.train() before each), or the updates were taken back (torchopt's "
        "extract_state_dict wants with_buffers=False in training): "
        f"{_PAGE}#layers-in-eval-mode"
    ]


def about_the_meta_gradient(module: nn.Module, lslr: LSLR | None) -> list[str]:
    """Returns whether the last backward left a gradient that no training survives."""
    named: dict[str, Tensor] = dict(module.named_parameters())
    if lslr is not None:
        named = {**named, "the rates of LSLR": lslr.rates}
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    if not grads:
        return []
    norms = {name: _norm([grad]) for name, grad in grads.items()}
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        return [
            f"problem: the meta-gradient of {listing(broken)} is not finite; do not step with it. "
            f"What makes it so is often second order: {_PAGE}#second-order-is-unstable"
        ]
    size, weights = math.hypot(*norms.values()), _norm([*module.parameters()])
    if not 0 < weights * _HUGE < size:
        return []
    largest = max(norms, key=norms.__getitem__)
    return [
        f"problem: the meta-gradient has norm {size:.3g}, the weights have {weights:.3g} (largest "
        f"of '{largest}'). If it is small in first order on the same batch, second order is "
        "unstable in this model: stay in first order, give norm layers eps=0.1, put norm before "
        "ReLU, clip the meta-gradient, or start from a smaller inner rate: "
        f"{_PAGE}#second-order-is-unstable"
    ]


def about_learned_rates(lslr: LSLR | None) -> list[str]:
    """Returns which inner rates have gone far from where they started."""
    if lslr is None or not lslr.lr > 0:
        return []
    relative = lslr.rates.detach() / lslr.lr
    findings = []
    turned = _names_where(lslr, relative.amin(1) < _TURNED)
    if turned:
        findings.append(
            f"warning: rates of {listing(turned)} are negative (down to "
            f"{lslr.rates.min().item():.3g}, from {lslr.lr:g}): these steps climb the support "
            "loss, which the paper allows; if accuracy falls, lower the rates' own meta rate: "
            f"{_PAGE}#rates-run-away"
        )
    grown = _names_where(lslr, relative.amax(1) > _GROWN)
    if grown:
        findings.append(
            f"warning: rates of {listing(grown)} are more than {_GROWN:g} times what they were "
            f"(up to {lslr.rates.max().item():.3g}, from {lslr.lr:g}); give the rates a smaller "
            f"meta rate in a parameter group of their own: {_PAGE}#rates-run-away"
        )
    return findings


def about_target_losses(aggregator: MultiStepLoss | FinalStepLoss | None) -> list[str]:
    """Returns whether the inner steps make the target loss worse."""
    if not isinstance(aggregator, (MultiStepLoss, FinalStepLoss)):
        return []
    losses = aggregator.recent_losses.tolist()
    known = [loss for loss in losses if not math.isnan(loss)]
    if len(known) < 2 or not known[-1] > _RISEN * abs(known[0]):
        return []
    shown = ", ".join(f"{loss:.3g}" for loss in known)
    return [
        f"problem: the target loss rises with the inner steps ({shown}), so they do harm; try a "
        f"smaller inner rate, or fewer steps: {_PAGE}#the-inner-rate-is-too-large"
    ]


def _names_where(lslr: LSLR, chosen: Tensor) -> list[str]:
    return [name for name, is_so in zip(lslr.names, chosen.tolist(), strict=True) if is_so]


def _norm(tensors: list[Tensor]) -> float:
    squares = [t.detach().double().abs().square().sum().cpu() for t in tensors]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
