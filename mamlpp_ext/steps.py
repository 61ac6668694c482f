"""Which inner step a forward belongs to, and how a loop drives it.

A per-step layer is any module with an attribute ``inner_step`` that holds an :class:`InnerStep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import checked_count, select_row

if TYPE_CHECKING:
    from mamlpp_ext.frozen import Freeze

# What forwards measured, in order: the layer and row, the batch mean and unbiased variance.
Tape = list[tuple[tuple[nn.Module, int], Tensor, Tensor]]


# The number of the backward that this thread is in, -1 for none; not public.
_backward_in_progress: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class _Driver:
    """One loop of ``inner_steps`` and what it was told of second order."""

    def __init__(self, second_order: bool | None) -> None:
        self.second_order = second_order


class InnerStep:
    """The position in the inner loop, shared by the per-step layers of one model.

    It is an object held by reference because ``higher.monkeypatch`` copies the plain attributes of
    each module once, when it patches: an int would go stale there, an object stays shared.

    Attributes:
        index: the current inner step, 0-based; 0 until a loop drives it.
        freezes: the ``frozen_statistics`` contexts that it is, or its original was, inside of.
        tape: where :func:`~mamlpp_ext.task_batch_loss` collects batch statistics instead of having
            them written at once, which ``torch.func`` transforms cannot do; otherwise None.
        driver: the loop that moves ``index`` at present.
        second_order: whether gradients of gradients will be asked for, by the adapter's context.
        placed: whether a context holds ``index`` where it is.
    """

    def __init__(self) -> None:
        self.index = 0
        self.freezes: list[Freeze] = []
        self.tape: Tape | None = None
        self.driver: _Driver | None = None
        self.second_order = True
        self.placed = False

    @property
    def first_order(self) -> bool:
        """Whether nobody will ask for a gradient of a gradient; a matter of speed alone.

        The layers may then take the forward that is quickest without.
        """
        said = None if self.driver is None else self.driver.second_order
        return not (self.second_order if said is None else said)

    @property
    def astray(self) -> bool:
        """Whether a backward calls this forward, at whatever step the loop has come to by then."""
        if self.placed or torch.compiler.is_compiling():
            return False
        return _backward_in_progress() >= 0

    @property
    def frozen(self) -> bool:
        """Whether a ``frozen_statistics`` context is open."""
        return any(freeze.open for freeze in self.freezes)

    def __repr__(self) -> str:
        return f"InnerStep(index={self.index})"


def per_step_layers(module: nn.Module) -> dict[str, Any]:
    """Returns the per-step layers of ``module`` by qualified name, shared ones once.

    Raises:
        TypeError: if ``module`` is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected the model, a torch.nn.Module, got {module!r:.80} of type "
            f"{type(module).__name__}; pass the model itself"
        )
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "inner_step", None), InnerStep)
    }


def clocks_of(module: nn.Module) -> list[InnerStep]:
    """Returns the positions that the per-step layers of ``module`` hold, shared ones once."""
    return _distinct(per_step_layers(module))


def checked_clocks(module: nn.Module, step: int) -> list[InnerStep]:
    """Returns the positions of ``module`` if all its layers have a row for ``step``."""
    layers = per_step_layers(module)
    for name, layer in layers.items():
        owner = f"layer '{name}' ({layer.__class__.__name__})"
        select_row(step, layer.num_steps, layer.extra_steps, owner)
    return _distinct(layers)


def _distinct(layers: dict[str, Any]) -> list[InnerStep]:
    return list({id(layer.inner_step): layer.inner_step for layer in layers.values()}.values())


def inner_steps(
    module: nn.Module, num_steps: int, *, second_order: bool | None = None
) -> Iterator[int]:
    """Counts the inner steps and moves every per-step layer of ``module`` along.

    Each step's support forward, update and target forward belong in the loop's body; they then use
    the row of that step. When the loop has run to its end the layers stay at the last step, so that
    a target forward written *below* the loop is the final step's. A loop left early (``break``, an
    exception) puts the step back to where it was.

    Args:
        module: the model, patched (``fnet``) or not; one without per-step layers is simply counted.
        num_steps: the number of inner steps, at least 1.
        second_order: whether gradients of gradients will be asked for. A matter of speed alone:
            norm layers take torch's own forward where False and it is quicker. None: as the
            adapters' ``innerloop_ctx`` has it, outside of them True.

    Returns:
        An iterator over 0, 1, ..., ``num_steps - 1``.

    Raises:
        TypeError: if ``module`` is no module or ``num_steps`` no whole number.
        ValueError: if it is below 1, or beyond the rows of a layer with ``extra_steps="error"``.
        RuntimeError: if another loop over the same model began before this one had ended.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = mpp.convert_batchnorm(torch.nn.BatchNorm1d(3), num_steps=5)
        >>> [step for step in mpp.inner_steps(net, 5)]
        [0, 1, 2, 3, 4]

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4: the step that per-step
        statistics, weights and biases are indexed by.
    """
    num_steps = checked_count("num_steps", num_steps)
    # Checked now, not at the first next(): a generator would be lazy.
    return _drive(checked_clocks(module, num_steps - 1), num_steps, second_order)


def _drive(clocks: list[InnerStep], num_steps: int, second_order: bool | None) -> Iterator[int]:
    # A loop that an exception left stays suspended for as long as the traceback is held, so the
    # newer loop takes the layers over and only the one that is resumed after that is refused.
    before = [clock.index for clock in clocks]
    driver = _Driver(second_order)
    for clock in clocks:
        clock.driver = driver
    finished = False
    try:
        for step in range(num_steps):
            if any(clock.driver is not driver for clock in clocks):
                raise RuntimeError(
                    f"inner step {step}: another inner_steps loop has begun on this model before "
                    "this one ended; loops over one model cannot be nested, use a copy of it"
                )
            for clock in clocks:
                clock.index = step
            yield step
        finished = True
    finally:
        for clock, index in zip(clocks, before, strict=True):
            if clock.driver is driver:
                clock.driver = None
                clock.index = clock.index if finished else index


@contextmanager
def at_step(module: nn.Module, step: int) -> Iterator[None]:
    """Runs the forwards inside the ``with`` block at a chosen inner step.

    Args:
        module: the model, patched or not.
        step: the inner step, 0-based.

    Raises:
        TypeError: if ``module`` is no module or ``step`` no whole number.
        ValueError: if it is negative, or beyond the rows of a layer with ``extra_steps="error"``.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = mpp.PerStepBatchNorm1d(3, num_steps=5)
        >>> with mpp.at_step(net, 4):
        ...     net(torch.randn(8, 3)).shape
        torch.Size([8, 3])

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4: the step that per-step
        statistics, weights and biases are indexed by.
    """
    step = checked_count("step", step, least=0)
    with placed_at(checked_clocks(module, step), step):
        yield


@contextmanager
def placed_at(clocks: list[InnerStep], step: int) -> Iterator[None]:
    """Runs the forwards inside the ``with`` block with these positions at ``step``."""
    with kept_steps(clocks):
        for clock in clocks:
            clock.index, clock.placed = step, True
        yield


@contextmanager
def of_order(clocks: list[InnerStep], second_order: bool) -> Iterator[None]:
    """Tells the layers of these positions whether gradients of gradients will be asked for."""
    before = [clock.second_order for clock in clocks]
    try:
        for clock in clocks:
            clock.second_order = second_order
        yield
    finally:
        for clock, earlier in zip(clocks, before, strict=True):
            clock.second_order = earlier


@contextmanager
def kept_steps(clocks: list[InnerStep]) -> Iterator[None]:
    """Puts the inner steps back on exit, however the block ends."""
    before = [(clock, clock.index, clock.driver, clock.placed) for clock in clocks]
    try:
        yield
    finally:
        for clock, index, driver, placed in before:
            clock.index, clock.driver, clock.placed = index, driver, placed
