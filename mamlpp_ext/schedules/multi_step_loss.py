"""Multi-step loss: every inner step's target loss counts, the early ones less and less."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mamlpp_ext.checks import checked_count
from mamlpp_ext.schedules.epochs import EpochSchedule

# The paper's code keeps at least this share of 1/K on the early steps until the annealing ends.
_FLOOR = 0.03


def multi_step_loss_weights(num_steps: int, epoch: int, anneal_epochs: int) -> Tensor:
    """The weight of each inner step's target loss at an epoch.

    With K = ``num_steps``, e = ``epoch``, E = ``anneal_epochs``:

        non-final steps: max(1/K - e / (K E), 0.03 / K)
        final step:      min(1/K + e (K - 1) / (K E), 1 - (K - 1) 0.03 / K)

    and from epoch E on the final step's loss alone counts.

    Args:
        num_steps: K, at least 1.
        epoch: e, 0-based, in epochs (not iterations).
        anneal_epochs: E, in epochs; 0 is plain MAML from the start.

    Returns:
        The weights, float64 of shape [num_steps]; they sum to 1.

    Raises:
        TypeError: if an argument is not a whole number.
        ValueError: if ``num_steps`` is below 1 or another is negative.

    Example:
        >>> multi_step_loss_weights(num_steps=5, epoch=5, anneal_epochs=10)
        tensor([0.1000, 0.1000, 0.1000, 0.1000, 0.6000], dtype=torch.float64)

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4, equation 4; the annealing
        is that of the authors' code.
    """
    steps = checked_count("num_steps", num_steps)
    epoch = checked_count("epoch", epoch, least=0)
    anneal_epochs = checked_count("anneal_epochs", anneal_epochs, least=0)
    if epoch >= anneal_epochs:
        early, final = 0.0, 1.0
    else:
        progress = epoch / anneal_epochs
        early = max((1 - progress) / steps, _FLOOR / steps)
        final = min((1 + progress * (steps - 1)) / steps, 1 - (steps - 1) * _FLOOR / steps)
    return torch.tensor([early] * (steps - 1) + [final], dtype=torch.float64)


class MultiStepLoss(EpochSchedule):
    """Adds up the target losses of the inner steps with weights that are annealed by epoch.

    Called as ``total = msl(step_losses)``; :meth:`step` once an epoch, like a torch scheduler.
    The paper's settings count 500 iterations as an epoch.

    Args:
        num_steps: K, the number of inner steps.
        anneal_epochs: E, in epochs: from then on the final step's loss alone counts. 10 for
            Omniglot and 15 for Mini-ImageNet in the paper.

    Attributes:
        last_epoch: the epoch the weights are of, 0 at first.
        weights: those weights, float64 of shape [num_steps].

    Raises:
        TypeError: if an argument is not a whole number.
        ValueError: if ``num_steps`` is below 1 or ``anneal_epochs`` negative.

    Example:
        >>> msl = MultiStepLoss(num_steps=2, anneal_epochs=10)
        >>> msl([torch.tensor(1.0), torch.tensor(3.0)])
        tensor(2.)
        >>> for _ in range(10):
        ...     msl.step()
        >>> msl([torch.tensor(1.0), torch.tensor(3.0)])
        tensor(3.)

    Source:
        As :func:`multi_step_loss_weights`.
    """

    def __init__(self, num_steps: int, anneal_epochs: int) -> None:
        super().__init__()
        self.num_steps = checked_count("num_steps", num_steps)
        self.anneal_epochs = checked_count("anneal_epochs", anneal_epochs, least=0)

    @property
    def weights(self) -> Tensor:
        """The weights of the present epoch, float64 of shape [num_steps]."""
        return multi_step_loss_weights(self.num_steps, self.last_epoch, self.anneal_epochs)

    def __call__(self, step_losses: Sequence[Tensor] | Tensor) -> Tensor:
        """Returns the weighted sum of the losses.

        Args:
            step_losses: a sequence of ``num_steps`` 0-dim tensors, or a tensor [..., num_steps].

        Returns:
            A 0-dim tensor, or [...]. Steps of weight 0 do not enter it: no gradient is computed
            for them, and one that is NaN does not spoil the rest. NaN at a step that counts does.

        Raises:
            TypeError: if ``step_losses`` holds anything but tensors.
            ValueError: if there are more or fewer than ``num_steps`` losses, or of several shapes.
        """
        losses = _by_step(step_losses, self.num_steps)
        weighted = zip(self.weights.tolist(), losses, strict=True)
        terms = [weight * loss for weight, loss in weighted if weight > 0]
        return torch.stack(terms).sum(0)


class FinalStepLoss(EpochSchedule):
    """Plain MAML's aggregator, with the interface of :class:`MultiStepLoss`: the last loss counts.

    Attributes:
        last_epoch: the present epoch, 0 at first; it makes no difference.

    Example:
        >>> FinalStepLoss()([torch.tensor(1.0), torch.tensor(3.0)])
        tensor(3.)

    Source:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning", ICML 2017, algorithm 2.
    """

    def __call__(self, step_losses: Sequence[Tensor] | Tensor) -> Tensor:
        """Returns the last loss.

        Args:
            step_losses: a sequence of 0-dim tensors, or a tensor [..., num_steps].

        Returns:
            A 0-dim tensor, or [...].

        Raises:
            TypeError: if ``step_losses`` holds anything but tensors.
            ValueError: if there is no loss.
        """
        return _by_step(step_losses, None)[-1]


def _by_step(step_losses: Sequence[Tensor] | Tensor, num_steps: int | None) -> tuple[Tensor, ...]:
    if isinstance(step_losses, Tensor):
        losses = step_losses.unbind(-1) if step_losses.dim() else (step_losses,)
    else:
        losses = tuple(step_losses) if isinstance(step_losses, Iterable) else (step_losses,)
    for loss in losses:
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"step_losses must hold one tensor for each inner step, got {loss!r} of type "
                f"{type(loss).__name__}; append the loss itself, not loss.item()"
            )
    shapes = {tuple(loss.shape) for loss in losses}
    if len(shapes) > 1:
        raise ValueError(
            f"step_losses must agree in shape, got {sorted(shapes)}; reduce every loss to a 0-dim "
            "tensor, e.g. with reduction='mean'"
        )
    if not losses or (num_steps is not None and len(losses) != num_steps):
        raise ValueError(
            f"step_losses must hold {num_steps or 'at least one'} losses, one for each inner step, "
            f"got {len(losses)}; append the target loss after every update"
        )
    return losses
