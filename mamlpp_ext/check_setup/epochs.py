"""What the schedules do, and whether they fit each other and the run."""

from __future__ import annotations

from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from mamlpp_ext.lslr import LSLR
from mamlpp_ext.schedules import DerivativeOrderAnnealing, FinalStepLoss, MultiStepLoss

Aggregator = MultiStepLoss | FinalStepLoss | None


def about_losses(lslr: LSLR | None, aggregator: Aggregator) -> list[str]:
    """Returns what is to say of the step losses."""
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


def about_order(schedule: DerivativeOrderAnnealing | None) -> list[str]:
    """Returns what is to say of first and second order."""
    if schedule is None:
        return ["off: derivative-order annealing (DA)"]
    if schedule.first_order_epochs == 0:
        return [
            "off: derivative-order annealing (DA), with first_order_epochs=0 second order from "
            "the start"
        ]
    return [
        f"on: derivative-order annealing (DA), first order for {schedule.first_order_epochs} epochs"
    ]


def about_meta_rate(scheduler: LRScheduler | None) -> list[str]:
    """Returns what is to say of the meta rate."""
    if not isinstance(scheduler, CosineAnnealingLR):
        return ["off: cosine annealing of the meta rate (CA)"]
    start, end = max(scheduler.base_lrs), scheduler.eta_min
    if start == end:
        return [
            f"problem: the cosine annealing of the meta rate starts and ends at {start:g}, so the "
            "rate never changes; pass a smaller eta_min, 1e-5 in the paper"
        ]
    return [f"on: cosine annealing of the meta rate (CA), {start:g} to {end:g}"]


def about_the_run(
    aggregator: Aggregator,
    order: DerivativeOrderAnnealing | None,
    scheduler: LRScheduler | None,
    run_epochs: int | None,
) -> list[str]:
    """Returns which schedules do not end within the run, or the cosine's part of it."""
    cosine = scheduler.T_max if isinstance(scheduler, CosineAnnealingLR) else None
    run, of = (cosine, "T_max") if run_epochs is None else (run_epochs, "run_epochs")
    if run is None:
        return []
    findings = []
    if order is not None and order.first_order_epochs >= run:
        findings.append(
            f"problem: derivative-order annealing stays in first order for "
            f"{order.first_order_epochs} epochs, and the run has {of}={run}: second order never "
            f"comes. DerivativeOrderAnnealing.for_run({run}) takes a tenth of it"
        )
    if isinstance(aggregator, MultiStepLoss) and aggregator.anneal_epochs >= run:
        findings.append(
            f"problem: multi-step loss is annealed over {aggregator.anneal_epochs} epochs, and the "
            f"run has {of}={run}: the final step never counts alone. "
            f"MultiStepLoss.for_run({aggregator.num_steps}, {run}) takes a tenth of it"
        )
    if run_epochs is not None and cosine is not None and abs(cosine - run_epochs) > 1:
        findings.append(
            f"problem: the cosine annealing of the meta rate has T_max={cosine}, and the run has "
            f"run_epochs={run_epochs}: the rate {_at_the_end(cosine, run_epochs)}. Pass "
            f"T_max={run_epochs}, and call its step() with those of the other schedules"
        )
    return findings


def _at_the_end(cosine: int, run_epochs: int) -> str:
    return "rises again" if cosine < run_epochs else "stays high to the end"
