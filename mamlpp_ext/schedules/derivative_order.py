"""Derivative-order annealing: first-order meta-gradients at first, second-order ones later."""

from __future__ import annotations

from mamlpp_ext.checks import checked_count
from mamlpp_ext.schedules.epochs import EpochSchedule


class DerivativeOrderAnnealing(EpochSchedule):
    """Says whether the present epoch is trained with second-order meta-gradients.

    First order takes the inner gradients as constants: cheaper, and by the paper's account steadier
    at the start; the meta-gradient still reaches the initial weights and the rates. Pass
    ``second_order=da.second_order`` to the inner loop, and call :meth:`step` once an epoch, like a
    torch scheduler (the paper's settings count 500 iterations as an epoch).

    Args:
        first_order_epochs: how many epochs are first-order, 50 in the paper; 0 for none.

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

    @property
    def second_order(self) -> bool:
        """Whether the present epoch is second-order."""
        return self.last_epoch >= self.first_order_epochs
