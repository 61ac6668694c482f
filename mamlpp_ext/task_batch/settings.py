"""How a meta-batch is learned from: what travels through the rooms as one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mamlpp_ext.checks import checked_count, checked_order
from mamlpp_ext.schedules import FinalStepLoss, MultiStepLoss

Loss = Callable[[Any, Any], Tensor]
Aggregate = Callable[[Tensor], Tensor]

_EXAMPLES = {
    "loss_fn": "a function such as torch.nn.functional.cross_entropy",
    "inner_loss_fn": "a function such as torch.nn.functional.cross_entropy, or None for loss_fn",
    "aggregate": "MultiStepLoss(...) or None",
}


class Settings(NamedTuple):
    """The arguments of ``task_batch_loss`` that say how to learn.

    Attributes:
        loss_fn: the loss of one task.
        num_steps: K.
        aggregate: from step losses to a task's loss; None for the final step's.
        second_order: whether to differentiate through the inner gradients.
        rematerialize: whether steps are rebuilt in the backward.
        all_step_losses: whether target losses that do not count are computed, too.
        inner_loss_fn: the support loss of one task; None for ``loss_fn``.
        chunked: whether tasks are taken in several chunks.
    """

    loss_fn: Loss
    num_steps: int
    aggregate: Aggregate | None
    second_order: bool
    rematerialize: bool
    all_step_losses: bool
    inner_loss_fn: Loss | None = None
    chunked: bool = False

    def checked(self) -> Settings:
        """Returns them if they are of the right kinds.

        Raises:
            TypeError: if one is not.
            ValueError: if a number is out of range, or the numbers of steps differ.
        """
        num_steps = checked_count("num_steps", self.num_steps)
        second_order = checked_order(self.second_order)
        for name in ("loss_fn", "inner_loss_fn", "aggregate"):
            function = getattr(self, name)
            if not callable(function) and (name == "loss_fn" or function is not None):
                raise TypeError(
                    f"{name} must be callable, got {function!r} of type {type(function).__name__}; "
                    f"pass {_EXAMPLES[name]}"
                )
        aggregate = self.aggregate
        if isinstance(aggregate, MultiStepLoss) and aggregate.num_steps != num_steps:
            raise ValueError(
                f"aggregate is a MultiStepLoss with num_steps={aggregate.num_steps}, but "
                f"task_batch_loss got num_steps={num_steps}; they must agree, so build it with "
                f"num_steps={num_steps}"
            )
        return self._replace(num_steps=num_steps, second_order=second_order)

    def counted_steps(self) -> list[bool]:
        """Says for each step whether its target loss enters the meta-loss, so needs a graph."""
        aggregate: Any = self.aggregate
        if type(aggregate) is MultiStepLoss:
            return [weight > 0 for weight in aggregate.weights.tolist()]
        # Of a subclass nothing is known.
        final_only = aggregate is None or type(aggregate) is FinalStepLoss
        return [not final_only or step == self.num_steps - 1 for step in range(self.num_steps)]

    @property
    def target_gradients_early(self) -> bool:
        """Whether the gradients of target losses may be taken as soon as these are computed.

        Then no graph of them is kept. A step's target losses have to enter with the same weight for
        every task, and the meta-loss is differentiated no more than once.
        """
        once = self.rematerialize or self.chunked
        return once and (
            self.aggregate is None or type(self.aggregate) in (MultiStepLoss, FinalStepLoss)
        )

    def loss_of_tasks(self, step_losses: Tensor) -> Tensor:
        """Returns the loss of each task, [T].

        Args:
            step_losses: [T, num_steps].

        Raises:
            ValueError: if ``aggregate`` returns anything else.
        """
        loss = step_losses[:, -1] if self.aggregate is None else self.aggregate(step_losses)
        if isinstance(loss, Tensor) and loss.shape == step_losses.shape[:1]:
            return loss
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"aggregate must return a loss for each task, [T] = {tuple(step_losses.shape[:1])}, "
            f"from step losses [T, num_steps] = {tuple(step_losses.shape)}, got {got}; reduce the "
            "last dimension alone, as in losses.mean(-1)"
        )

    def learned(self) -> list[Tensor]:
        """Returns the parameters of the functions that are modules."""
        functions = (self.loss_fn, self.inner_loss_fn, self.aggregate)
        every = (p for f in functions if isinstance(f, nn.Module) for p in f.parameters())
        return [p for p in every if p.requires_grad]
