"""The losses of the inner steps as an aggregator is given them, and the last of them kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.torch_private import transforms_active

# One for each inner step; None in a sequence where the weight is 0. Or a tensor [..., num_steps].
StepLosses = Sequence[Tensor | None] | Tensor
_KEPT = 16  # calls: enough that a single task says little


class RecentLosses:
    """The losses of the last calls, without their graphs; what they say is computed when asked."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Tensor | None, ...]] = deque(maxlen=_KEPT)

    def add(self, losses: Sequence[Tensor | None]) -> None:
        """Keeps the losses of a call, unless they are a transform's or a compiler's."""
        if not (transforms_active() or torch.compiler.is_compiling()):
            self._calls.append(tuple(None if loss is None else loss.detach() for loss in losses))

    def mean(self) -> Tensor:
        """Returns the mean over calls and tasks, float64 [num_steps]; NaN for steps never given."""
        steps = len(self._calls[-1]) if self._calls else 0
        calls = [losses for losses in self._calls if len(losses) == steps]
        means = []
        for step in range(steps):
            given = [loss for losses in calls if (loss := losses[step]) is not None]
            values = [loss.double().mean().cpu() for loss in given]
            means.append(torch.stack(values).nanmean() if values else torch.tensor(torch.nan))
        return torch.stack(means).double() if means else torch.empty(0, dtype=torch.float64)


def by_step(step_losses: StepLosses, weights: Sequence[float] | None) -> tuple[Tensor | None, ...]:
    """Returns the losses as one for each step.

    Args:
        step_losses: as the aggregators take them.
        weights: of the steps; None for as many as there are, of which the last counts.

    Raises:
        TypeError: if something is no tensor, or None where a loss counts.
        ValueError: if there are more or fewer than weights, or of several shapes.
    """
    losses: tuple[Any, ...]
    if isinstance(step_losses, Tensor):
        losses = step_losses.unbind(-1) if step_losses.dim() else (step_losses,)
    else:
        losses = tuple(step_losses) if isinstance(step_losses, Iterable) else (step_losses,)
    counted = [False] * (len(losses) - 1) + [True] if weights is None else [w > 0 for w in weights]
    for step, loss in enumerate(losses):
        if loss is None and step < len(counted) and counted[step]:
            raise TypeError(
                f"step_losses[{step}] is None, but the loss of this step counts at this epoch; "
                f"append None only where counts(step) is False, as it is not for step {step}"
            )
        if not (loss is None or isinstance(loss, Tensor)):
            raise TypeError(
                f"step_losses must hold one tensor for each inner step, got {loss!r} of type "
                f"{type(loss).__name__}; append the loss itself, not loss.item()"
            )
    shapes = {tuple(loss.shape) for loss in losses if loss is not None}
    if len(shapes) > 1:
        raise ValueError(
            f"step_losses must agree in shape, got {sorted(shapes)}; reduce every loss to a 0-dim "
            "tensor, e.g. with reduction='mean'"
        )
    if not losses or len(losses) != len(counted):
        raise ValueError(
            f"step_losses must hold {len(weights or ()) or 'at least one'} losses, one for each "
            f"inner step, got {len(losses)}; append the target loss after every update"
        )
    return losses
