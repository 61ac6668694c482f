"""Derivative-order annealing: first-order meta-gradients at first, second-order ones later."""

from __future__ import annotations

from mamlpp_ext.checks import checked_count
from mamlpp_ext.schedules.epochs import EpochSchedule, epochs_of_run


class DerivativeOrderAnnealing(EpochSchedule):
    """Says whether the present epoch is trained with second-order meta-gradients.

    First order takes the inner gradients as constants: cheaper, and by the paper's account steadier
    at the start; the meta-gradient still reaches the initial weights and the rates. Pass
    ``second_order=da.second_order`` to the inner loop, and call :meth:`step` once an epoch, like a
    torch scheduler (the paper's settings count 500 iterations as an epoch).

    Args:
        first_order_epochs: how many epochs are first-order, 50 of 100 in the paper; 0 for none,
            which is second order from the start.

    Attributes:
        last_epoch: the present epoch, 0 at first.

    Raises:
        TypeError: if ``first_order_epochs`` is not a whole number.
        ValueError: if it is negative.

    Example:
        >>> da = DerivativeOrderAnnealing(first_order_epochs=1)
        >>> da.second_order
        False
        >>> da.step()
        >>> da.second_order
        True

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4 (DA).
    """

    def __init__(self, first_order_epochs: int) -> None:
        super().__init__()
        self.first_order_epochs = checked_count("first_order_epochs", first_order_epochs, least=0)

    @classmethod
    def for_run(cls, run_epochs: int, share: float = 0.1) -> DerivativeOrderAnnealing:
        """Returns the schedule whose first-order part is a share of a run.

        A function beside the constructor, which goes on counting epochs: so a run of any length
        has its second order, and both ways count calls of :meth:`step`.

        Args:
            run_epochs: how often :meth:`step` will be called in the run: epochs, or iterations in
                a loop without epochs; ``T_max`` of the cosine beside it.
            share: of the run, 0 to 1. Half is the paper's; a tenth is safer in short runs.

        Returns:
            One with ``first_order_epochs`` of that share, at least 1 unless ``share`` is 0.

        Raises:
            TypeError: if ``run_epochs`` is not a whole number.
            ValueError: if it is below 1, or ``share`` is not between 0 and 1.

        Example:
            >>> DerivativeOrderAnnealing.for_run(300, share=0.5)
            DerivativeOrderAnnealing(last_epoch=0, first_order_epochs=150)
        """
        return cls(epochs_of_run(run_epochs, share))

    @property
    def second_order(self) -> bool:
        """Whether the present epoch is second-order."""
        return self.last_epoch >= self.first_order_epochs
