"""What a whole training costs: MAML++ has iterations of several kinds, each for its share of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The kinds of iterations that a training by MAML++ is made of.

    Attributes:
        name: what the table calls it.
        epochs: of the training.
        multi_step: the first epochs, in which the target losses of all steps count.
        first_order: the first epochs, in which meta-gradients are first-order.
        goal: what its time by that of second-order MAML should not exceed.
    """

    name: str
    epochs: int
    multi_step: int
    first_order: int
    goal: float

    def seconds(self, of_kind: Mapping[str, Sequence[float]]) -> list[float]:
        """Returns what an iteration takes on average over the training, in each round.

        Args:
            of_kind: the seconds of each of ``KINDS``, round by round.
        """
        shares = self.shares()
        rounds = zip(*(of_kind[kind] for kind in KINDS), strict=True)
        return [
            sum(shares[kind] * took for kind, took in zip(KINDS, each, strict=True))
            for each in rounds
        ]

    def shares(self) -> dict[str, float]:
        """Returns the share of the training for each of ``KINDS``."""
        found = dict.fromkeys(KINDS, 0.0)
        for epoch in range(self.epochs):
            kind = kind_of(epoch >= self.first_order, epoch < self.multi_step)
            found[kind] += 1 / self.epochs
        return found


def kind_of(second_order: bool, multi_step: bool) -> str:
    """Returns what an iteration of MAML++ is called."""
    order, loss = "second" if second_order else "first", "every" if multi_step else "last"
    return f"{order} order, {loss} loss"


KINDS = {kind_of(*how): how for how in ((False, True), (False, False), (True, True), (True, False))}
SCHEDULES = (
    Schedule("the paper's (100 epochs: 10 multi-step, 50 first order)", 100, 10, 50, 0.85),
    Schedule("the demo's (100 epochs: 10 multi-step, 5 first order)", 100, 10, 5, 0.95),
)
