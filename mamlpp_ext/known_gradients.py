"""What a rematerialised step has found out of its inner gradients, for when it is rebuilt.

The gradients of the convolutions' weights are a third of a step's arithmetic and as small as the
weights. Rebuilding the step wants their graph, not their values: these it has had before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KnownGradients:
    """The gradients of the weights of a step's convolutions, by the order of their calls.

    Args:
        keep: returns a copy of a tensor in memory that may be held for long.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        self.keep = keep
        self.slots: list[Slot] = []
        self.calls = 0
        self.inner_backward = False

    def begin(self) -> None:
        """The step is run: the next call of a convolution is the first again."""
        self.calls = 0

    @contextmanager
    def in_the_inner_backward(self) -> Iterator[None]:
        """Each convolution's backward is called once, with the gradient of the support loss.

        Only then: the outer backward comes by the same places with other gradients.
        """
        self.inner_backward = True
        try:
            yield
        finally:
            self.inner_backward = False

    def of_this_call(self) -> Slot:
        """Returns where the weight gradient of the convolution that is called now belongs."""
        if self.calls == len(self.slots):
            self.slots.append(Slot(self))
        self.calls += 1
        return self.slots[self.calls - 1]


class Slot:
    """The weight gradient of one call of a convolution, once it is known."""

    def __init__(self, step: KnownGradients) -> None:
        self.step = step
        self.value: Tensor | None = None

    def known(self, weight: Tensor) -> Tensor | None:
        """Returns it, if this is when it was computed before."""
        if not self.step.inner_backward or self.value is None or self.value.shape != weight.shape:
            return None
        return self.value

    def learn(self, gradient: Tensor | None) -> None:
        """Keeps it, if it is the inner one and has no graph, as in a step's first run."""
        if self.step.inner_backward and gradient is not None and not torch.is_grad_enabled():
            self.value = self.step.keep(gradient)
