"""Multi-step loss: every inner step's target loss counts, the early ones less and less."""

from __future__ import annotations

import torch
from torch import Tensor

from mamlpp_ext.checks import checked_count
from mamlpp_ext.schedules.epochs import EpochSchedule, epochs_of_run
from mamlpp_ext.schedules.step_losses import RecentLosses, StepLosses, by_step

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
        recent_losses: what the last calls were given.

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
        self._recent = RecentLosses()

    @classmethod
    def for_run(cls, num_steps: int, run_epochs: int, share: float = 0.1) -> MultiStepLoss:
        """Returns the aggregator that is annealed over a share of a run.

        A function beside the constructor, which goes on counting epochs: so a short run does not
        end before its annealing, and both ways count calls of :meth:`step`.

        Args:
            num_steps: K, the number of inner steps.
            run_epochs: how often :meth:`step` will be called in the run: epochs, or iterations in
                a loop without epochs; ``T_max`` of the cosine beside it.
            share: of the run, 0 to 1. A tenth is the paper's for Omniglot.

        Returns:
            One with ``anneal_epochs`` of that share, at least 1 unless ``share`` is 0.

        Raises:
            TypeError: if a number of epochs or steps is not whole.
            ValueError: if one is below 1, or ``share`` is not between 0 and 1.

        Example:
            >>> MultiStepLoss.for_run(num_steps=5, run_epochs=300)
            MultiStepLoss(last_epoch=0, num_steps=5, anneal_epochs=30)
        """
        return cls(num_steps, epochs_of_run(run_epochs, share))

    @property
    def weights(self) -> Tensor:
        """The weights of the present epoch, float64 of shape [num_steps]."""
        return multi_step_loss_weights(self.num_steps, self.last_epoch, self.anneal_epochs)

    @property
    def recent_losses(self) -> Tensor:
        """Mean losses of the last 16 calls by step, float64 [num_steps], NaN if unknown."""
        return self._recent.mean()

    def counts(self, step: int) -> bool:
        """Returns whether a step's target loss enters the sum at the present epoch.

        A loop of one's own need not compute the others: ``None`` stands for them.

        Args:
            step: the inner step, 0-based.

        Raises:
            TypeError: if ``step`` is not a whole number.
            ValueError: if it is negative.

        Example:
            >>> msl = MultiStepLoss(num_steps=2, anneal_epochs=0)
            >>> msl.counts(0), msl.counts(1)
            (False, True)
            >>> msl([None, torch.tensor(3.0)])
            tensor(3.)
        """
        step = checked_count("step", step, least=0)
        return step == self.num_steps - 1 or (
            step < self.num_steps and self.last_epoch < self.anneal_epochs
        )

    def __call__(self, step_losses: StepLosses) -> Tensor:
        """Returns the weighted sum of the losses.

        Args:
            step_losses: a sequence of ``num_steps`` 0-dim tensors, or a tensor [..., num_steps].
                In a sequence None may stand where the weight is 0, as :meth:`counts` says.

        Returns:
            A 0-dim tensor, or [...]. Steps of weight 0 do not enter it: no gradient is computed
            for them, and one that is NaN does not spoil the rest. NaN at a step that counts does.

        Raises:
            TypeError: if ``step_losses`` holds anything but tensors.
            ValueError: if there are more or fewer than ``num_steps`` losses, or of several shapes.
        """
        weights = self.weights.tolist()
        losses = by_step(step_losses, weights)
        self._recent.add(losses)
        weighted = zip(weights, losses, strict=True)
        terms = [weight * loss for weight, loss in weighted if loss is not None and weight > 0]
        return torch.stack(terms).sum(0)


class FinalStepLoss(EpochSchedule):
    """Plain MAML's aggregator, with the interface of :class:`MultiStepLoss`: the last loss counts.

    Args:
        num_steps: K, where :meth:`counts` is asked; None if it is not.

    Attributes:
        last_epoch: the present epoch, 0 at first; it makes no difference.
        recent_losses: what the last calls were given.

    Raises:
        TypeError: if ``num_steps`` is not a whole number.
        ValueError: if it is below 1.

    Example:
        >>> FinalStepLoss()([torch.tensor(1.0), torch.tensor(3.0)])
        tensor(3.)

    Source:
        Finn, Abbeel, Levine, "Model-agnostic meta-learning", ICML 2017, algorithm 2.
    """

    def __init__(self, num_steps: int | None = None) -> None:
        super().__init__()
        # Not among the settings of a state_dict: those of earlier versions have none.
        self._num_steps = None if num_steps is None else checked_count("num_steps", num_steps)
        self._recent = RecentLosses()

    @property
    def recent_losses(self) -> Tensor:
        """Mean losses of the last 16 calls by step, float64 [num_steps], NaN if unknown."""
        return self._recent.mean()

    def counts(self, step: int) -> bool:
        """Returns whether a step's target loss is needed: the last, or all if K is not known.

        Args:
            step: the inner step, 0-based.

        Raises:
            TypeError: if ``step`` is not a whole number.
            ValueError: if it is negative.
        """
        step = checked_count("step", step, least=0)
        return self._num_steps is None or step == self._num_steps - 1

    def __call__(self, step_losses: StepLosses) -> Tensor:
        """Returns the last loss.

        Args:
            step_losses: a sequence of 0-dim tensors, the others None or not, or a tensor
                [..., num_steps].

        Returns:
            A 0-dim tensor, or [...].

        Raises:
            TypeError: if ``step_losses`` holds anything but tensors.
            ValueError: if there is no loss.
        """
        losses = by_step(step_losses, None)
        self._recent.add(losses)
        return losses[-1]  # type: ignore[return-value]
