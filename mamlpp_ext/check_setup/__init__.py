"""Says in words what of MAML++ is on, what is off, what cannot work and what goes wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from mamlpp_ext.check_setup.epochs import (
    about_losses,
    about_meta_rate,
    about_order,
    about_the_run,
)
from mamlpp_ext.check_setup.health import (
    about_learned_rates,
    about_statistics,
    about_target_losses,
    about_the_meta_gradient,
)
from mamlpp_ext.check_setup.norm import about_norm
from mamlpp_ext.check_setup.wiring import about_gradients, about_optimizer, about_rates
from mamlpp_ext.checks import checked_count
from mamlpp_ext.lslr import LSLR, checked_lslr
from mamlpp_ext.schedules import DerivativeOrderAnnealing, FinalStepLoss, MultiStepLoss

__all__ = ["check_setup"]


def check_setup(
    module: nn.Module,
    lslr: LSLR | None,
    meta_optimizer: torch.optim.Optimizer | None = None,
    *,
    multi_step_loss: MultiStepLoss | FinalStepLoss | None = None,
    derivative_order: DerivativeOrderAnnealing | None = None,
    meta_scheduler: LRScheduler | None = None,
    run_epochs: int | None = None,
) -> list[str]:
    """Says which of the six improvements are on, which are off, and what cannot work.

    Call it once before training, in the mode in which the inner loop trains, and once more between
    a ``backward`` and the meta-optimizer's ``step``: only then can it see which parameters no
    gradient reaches, and whether the training is sound: how large the meta-gradient is, where rates
    have gone, whether target losses rise with the inner steps, whether statistics are kept. A loop
    may call it every so often; it waits for the GPU. The target losses are those of the last 16
    calls of ``multi_step_loss``, which keeps them: a loop need not hand them over a second time.

    Args:
        module: the model.
        lslr: the rates; None if there are none.
        meta_optimizer: the outer loop's optimizer.
        multi_step_loss: the aggregator of the step losses.
        derivative_order: the schedule of first and second order.
        meta_scheduler: the schedule of the meta rate.
        run_epochs: how often the schedules' ``step()`` will be called in the run, if it is known;
            otherwise ``T_max`` of a cosine counts as that.

    Returns:
        The findings, each a sentence that begins with ``on:``, ``off:``, ``problem:`` (cannot work)
        or ``warning:`` (may be meant so). What is not passed counts as off.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if ``run_epochs`` is below 1.

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
    if run_epochs is not None:
        run_epochs = checked_count("run_epochs", run_epochs)
    return [
        *about_norm(module, lslr),
        *about_rates(module, lslr),
        *about_losses(lslr, multi_step_loss),
        *about_order(derivative_order),
        *about_meta_rate(meta_scheduler),
        *about_the_run(multi_step_loss, derivative_order, meta_scheduler, run_epochs),
        *about_optimizer(module, lslr, meta_optimizer),
        *about_gradients(module, lslr),
        *about_statistics(module),
        *about_the_meta_gradient(module, lslr),
        *about_learned_rates(lslr),
        *about_target_losses(multi_step_loss),
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
