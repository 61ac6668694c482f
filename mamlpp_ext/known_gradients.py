"""What a rematerialised step has found out of its inner gradients, for when it is rebuilt.

The gradients of the convolutions' weights and biases are a third of a step's arithmetic, and as
small as these are. Rebuilding the step wants their graph; it has had their values before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Slot:
    """The gradients of one call of a convolution, once they are known.

    Attributes:
        inner: whether a step's inner backward is running, as the item of a list that all share; a
            slot that held what it belongs to would keep both alive.
        of_weight: of the weight's shape, or None.
        of_bias: of the bias's shape, or None.
    """

    def __init__(self, inner: list[bool], keep: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.keep = inner, keep
        self.of_weight: Tensor | None = None
        self.of_bias: Tensor | None = None

    def is_known(self, weight: Tensor) -> bool:
        """Returns whether this is when they were computed before."""
        there = self.of_weight is not None and self.of_weight.shape == weight.shape
        return self.inner[0] and there

    def learn(self, of_weight: Tensor | None, of_bias: Tensor | None) -> None:
        """Keeps them, if they are the inner ones and have no graph, as in a step's first run."""
        if self.inner[0] and not torch.is_grad_enabled():
            kept = [None if t is None else self.keep(t) for t in (of_weight, of_bias)]
            self.of_weight, self.of_bias = kept


class KnownGradients:
    """The gradients of the weights and biases of a step's convolutions, in the order of the calls.

    Args:
        keep: returns a tensor's values in memory that may be held for long; nobody writes there.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        self.inner = [False]
        self.slots: list[Slot] = []
        self.calls = 0

    def begin(self) -> None:
        """The step is run: the next call of a convolution is the first again."""
        self.calls = 0

    def next_slot(self) -> Slot:
        """Returns where the gradients of the convolution that is called now belong."""
        if self.calls == len(self.slots):
            self.slots.append(Slot(self.inner, self.keep))
        self.calls += 1
        return self.slots[self.calls - 1]

    @contextmanager
    def in_the_inner_backward(self) -> Iterator[None]:
        """Each convolution's backward is called once, with the gradient of the support loss.

        Only then: the outer backward comes by the same places with other gradients.
        """
        self.inner[0] = True
        try:
            yield
        finally:
            self.inner[0] = False
