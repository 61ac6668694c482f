"""Says in words what of MAML++ is on, what is off and what cannot work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr import LSLR, checked_lslr
from mamlpp_ext.schedules import DerivativeOrderAnnealing, FinalStepLoss, MultiStepLoss
from mamlpp_ext.steps import per_step_layers, per_step_tables
from mamlpp_ext.torch_private import is_batch_norm

_FIX_OPTIMIZER = "build it from [*module.parameters(), *lslr.parameters()] after the conversion"


def check_setup(
    module: nn.Module,
    lslr: LSLR | None,
    meta_optimizer: torch.optim.Optimizer | None = None,
    *,
    multi_step_loss: MultiStepLoss | FinalStepLoss | None = None,
    derivative_order: DerivativeOrderAnnealing | None = None,
    meta_scheduler: LRScheduler | None = None,
) -> list[str]:
    """Says which of the six improvements are on, which are off, and what cannot work.

    Call it once before training, and once more after the first ``backward``: only then can it see
    which parameters no gradient reaches.

    Args:
        module: the model.
        lslr: the rates; None if there are none.
        meta_optimizer: the outer loop's optimizer.
        multi_step_loss: the aggregator of the step losses.
        derivative_order: the schedule of first and second order.
        meta_scheduler: the schedule of the meta rate.

    Returns:
        The findings, each a sentence that begins with ``on:``, ``off:`` or ``problem:``. What is
        not passed counts as off.

    Raises:
        TypeError: if an argument is of another kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> lslr = LSLR(net, num_steps=5)
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> for finding in check_setup(net, lslr, optimizer):
        ...     if finding.startswith("problem:"):
        ...         print(finding.partition(";")[0])
        problem: 1 plain BatchNorm layer is left over ('1')
        problem: the rates of LSLR are not in the meta-optimizer and will never change

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4, for the six improvements.
    """
    _check_kinds(lslr, multi_step_loss, derivative_order)
    return [
        *_about_norm(module, lslr),
        *_about_rates(module, lslr),
        *_about_losses(lslr, multi_step_loss),
        *_about_order(derivative_order),
        *_about_meta_rate(meta_scheduler),
        *_about_optimizer(module, lslr, meta_optimizer),
        *_about_gradients(module, lslr),
    ]


def _check_kinds(lslr: Any, multi_step_loss: Any, derivative_order: Any) -> None:
    if lslr is not None:
        checked_lslr(lslr)
    if not (multi_step_loss is None or callable(multi_step_loss)):
        raise TypeError(
            "multi_step_loss must be a MultiStepLoss, another aggregator or None, got "
            f"{multi_step_loss!r}; pass each schedule by its own name"
        )
    if not (derivative_order is None or isinstance(derivative_order, DerivativeOrderAnnealing)):
        raise TypeError(
            "derivative_order must be a DerivativeOrderAnnealing or None, got "
            f"{derivative_order!r}; pass each schedule by its own name"
        )


def _about_norm(module: nn.Module, lslr: LSLR | None) -> list[str]:
    layers = per_step_layers(module)
    plain = [name for name, layer in module.named_modules() if is_batch_norm(layer)]
    findings = []
    per_step = {name: layer for name, layer in layers.items() if layer.num_steps != 1}
    norms = {name: layer for name, layer in per_step.items() if hasattr(layer, "running_mean")}
    for short, what, attribute in (
        ("BNRS", "statistics", "running_mean"),
        ("BNWB", "weights and biases", "weight"),
    ):
        having = [name for name in norms if getattr(norms[name], attribute) is not None]
        state = "on" if having else "off"
        findings.append(f"{state}: per-step batch-norm {what} ({short}) in {len(having)} layers")
    others = [name for name in per_step if name not in norms]
    if others:
        findings.append(
            f"on: per-step parameters of {len(others)} other layers ({listing(others)})"
        )
    if plain:
        noun = "layer is" if len(plain) == 1 else "layers are"
        findings.append(
            f"problem: {len(plain)} plain BatchNorm {noun} left over ({listing(plain)}); convert "
            "the model with convert_batchnorm"
        )
    return [*findings, *_about_rows(module, lslr, per_step)]


def _about_rows(module: nn.Module, lslr: LSLR | None, per_step: dict[str, Any]) -> list[str]:
    findings = []
    rows = [name for name, table in per_step_tables(module).items() if len(table) != 1]
    adapted = [row for row in rows if lslr is not None and row in lslr.names]
    if adapted:
        findings.append(
            f"on: the inner loop adapts rows of per-step layers, too ({listing(adapted)}); for "
            "the outer loop to learn them alone, build the LSLR from the converted model with "
            "adapt=None"
        )
    idle = [name for name, layer in per_step.items() if _first_row_alone(layer)]
    if idle:
        findings.append(
            f"problem: forwards have used the first row alone of {listing(idle)}; write the inner "
            "loop as 'for step in mamlpp_ext.inner_steps(model, num_steps)', which tells the layers"
        )
    for name, layer in per_step.items():
        if lslr is not None and layer.num_steps != lslr.num_steps:
            findings.append(
                f"problem: layer '{name}' has num_steps={layer.num_steps}, LSLR has "
                f"num_steps={lslr.num_steps}; build both with the number of inner steps"
            )
    return findings


def _first_row_alone(layer: Any) -> bool:
    counts = getattr(layer, "num_batches_tracked", None)
    return counts is not None and bool(counts[0] > 0) and not bool(counts[1:].any())


def _about_rates(module: nn.Module, lslr: LSLR | None) -> list[str]:
    if lslr is None:
        return ["off: learned inner rates (LSLR)"]
    missing = [name for name in lslr.names if name not in dict(module.named_parameters())]
    if missing:
        return [
            f"problem: LSLR adapts {listing(missing)}, which the model does not have; build it "
            "from this model"
        ]
    tensors = f"{len(lslr.names)} tensors over {lslr.num_steps} steps"
    if not lslr.rates.requires_grad:
        return [f"off: learned inner rates (LSLR); the rates of {tensors} are fixed"]
    return [f"on: learned inner rates (LSLR), {lslr.rates.numel()} rates for {tensors}"]


def _about_losses(lslr: LSLR | None, aggregator: MultiStepLoss | FinalStepLoss | None) -> list[str]:
    if not isinstance(aggregator, MultiStepLoss):
        return ["off: multi-step loss (MSL), the final step's loss alone counts"]
    epochs, findings = aggregator.anneal_epochs, []
    if epochs:
        findings = [f"on: multi-step loss (MSL), annealed over {epochs} epochs"]
    else:
        findings = [
            "problem: multi-step loss is annealed over 0 epochs, so it starts where it ends and "
            "only the final step counts; pass anneal_epochs=10, or use FinalStepLoss"
        ]
    if lslr is not None and aggregator.num_steps != lslr.num_steps:
        findings.append(
            f"problem: MultiStepLoss has num_steps={aggregator.num_steps}, LSLR has "
            f"num_steps={lslr.num_steps}; build both with the number of inner steps"
        )
    return findings


def _about_order(schedule: DerivativeOrderAnnealing | None) -> list[str]:
    if schedule is None:
        return ["off: derivative-order annealing (DA)"]
    if schedule.first_order_epochs == 0:
        return [
            "problem: derivative-order annealing has first_order_epochs=0, so it is second order "
            "from the start; pass at least 1, or leave the schedule out"
        ]
    return [
        f"on: derivative-order annealing (DA), first order for {schedule.first_order_epochs} epochs"
    ]


def _about_meta_rate(scheduler: LRScheduler | None) -> list[str]:
    if not isinstance(scheduler, CosineAnnealingLR):
        return ["off: cosine annealing of the meta rate (CA)"]
    start, end = max(scheduler.base_lrs), scheduler.eta_min
    if start == end:
        return [
            f"problem: the cosine annealing of the meta rate starts and ends at {start:g}, so the "
            "rate never changes; pass a smaller eta_min, 1e-5 in the paper"
        ]
    return [f"on: cosine annealing of the meta rate (CA), {start:g} to {end:g}"]


def _about_optimizer(
    module: nn.Module, lslr: LSLR | None, optimizer: torch.optim.Optimizer | None
) -> list[str]:
    if optimizer is None:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    findings = []
    if lslr is not None and lslr.rates.requires_grad and id(lslr.rates) not in held:
        findings.append(
            "problem: the rates of LSLR are not in the meta-optimizer and will never change; "
            + _FIX_OPTIMIZER
        )
    named = module.named_parameters()
    outside = [name for name, p in named if p.requires_grad and id(p) not in held]
    if outside:
        findings.append(
            f"problem: {len(outside)} parameters of the model are not in the meta-optimizer "
            f"({listing(outside)}); {_FIX_OPTIMIZER}"
        )
    return findings


def _about_gradients(module: nn.Module, lslr: LSLR | None) -> list[str]:
    named = dict(module.named_parameters())
    if lslr is not None:
        named["the rates of LSLR"] = lslr.rates
    trained = {name: p for name, p in named.items() if p.requires_grad}
    unreached = [name for name, p in trained.items() if p.grad is None]
    if len(unreached) in (0, len(trained)):  # none at all: backward has not been called yet
        return []
    return [
        f"problem: no gradient reaches {listing(unreached)}; use it in forward, freeze it with "
        "requires_grad_(False), or look for a detach() on its way to the loss"
    ]
