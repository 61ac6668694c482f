"""Which inner step a forward belongs to, and how a loop drives it.

A per-step layer is any module that holds an :class:`InnerStep` as its ``inner_step``. Those of its
parameters that its ``per_step_names`` name, or all, are tables: [num_steps, ...].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import checked_count, select_row
from mamlpp_ext.torch_private import in_backward

# What forwards measured, in order: the layer and row, the batch mean and unbiased variance.
BatchStatistics = list[tuple[tuple[nn.Module, int], Tensor, Tensor]]


class Freeze:
    """One ``frozen_statistics`` context. A copy of a model made inside holds this very object."""

    def __init__(self) -> None:
        self.open = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Freeze:
        return self

    def __getstate__(self) -> dict[str, bool]:
        return {"open": False}  # of a pickle: no context is open where it is loaded


class _Loop:
    """One loop of ``inner_steps`` and what it was told of second order."""

    def __init__(self, second_order: bool | None) -> None:
        self.second_order = second_order


class InnerStep:
    """The counter of inner steps that the per-step layers of one model share.

    It is an object held by reference because ``higher.monkeypatch`` copies the plain attributes of
    each module once, when it patches: an int would go stale there, an object stays shared.

    Attributes:
        index: the current inner step, 0-based; 0 until a loop drives it.
        freezes: the ``frozen_statistics`` contexts that it is, or its original was, inside of.
        collected: where :func:`~mamlpp_ext.task_batch_loss` has batch statistics collected instead
            of written at once, which ``torch.func`` transforms cannot do; otherwise None.
        loop: the loop that moves ``index`` at present.
        second_order: whether gradients of gradients will be asked for, by the adapter's context.
        fixed: whether a context holds ``index`` where it is.
    """

    def __init__(self) -> None:
        self.index = 0
        self.freezes: list[Freeze] = []
        self.collected: BatchStatistics | None = None
        self.loop: _Loop | None = None
        self.second_order = True
        self.fixed = False

    @property
    def first_order(self) -> bool:
        """Whether nobody will ask for a gradient of a gradient; a matter of speed alone."""
        by_loop = None if self.loop is None else self.loop.second_order
        return not (self.second_order if by_loop is None else by_loop)

    @property
    def called_in_backward(self) -> bool:
        """Whether a backward calls this forward, at whatever step the loop has come to by then."""
        if self.fixed or torch.compiler.is_compiling():
            return False
        return in_backward()

    @property
    def frozen(self) -> bool:
        """Whether a ``frozen_statistics`` context is open."""
        return any(freeze.open for freeze in self.freezes)

    def __repr__(self) -> str:
        return f"InnerStep(index={self.index})"


def per_step_layers(module: nn.Module) -> dict[str, Any]:
    """Returns the per-step layers of ``module`` by qualified name, shared ones once."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected the model, a torch.nn.Module, got {module!r:.80} of type "
            f"{type(module).__name__}; pass the model itself"
        )
    named = module.named_modules()
    return {name: m for name, m in named if isinstance(getattr(m, "inner_step", None), InnerStep)}


def per_step_tables(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of ``module`` that have a row for every inner step, by name."""
    tables: dict[str, nn.Parameter] = {}
    for path, layer in per_step_layers(module).items():
        own = dict(layer.named_parameters())
        names = [name for name in getattr(layer, "per_step_names", own) if name in own]
        tables |= {f"{path}.{name}".lstrip("."): own[name] for name in names}
    return tables


def step_counters(module: nn.Module) -> list[InnerStep]:
    """Returns the counters that the per-step layers of ``module`` hold, shared ones once."""
    return [*dict.fromkeys(layer.inner_step for layer in per_step_layers(module).values())]


def checked_counters(module: nn.Module, step: int) -> list[InnerStep]:
    """Returns the counters of ``module`` if all its layers have a row for ``step``."""
    layers = per_step_layers(module)
    for name, layer in layers.items():
        owner = f"layer '{name}' ({layer.__class__.__name__})"
        select_row(step, layer.num_steps, layer.extra_steps, owner)
    return [*dict.fromkeys(layer.inner_step for layer in layers.values())]


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
    return _drive(checked_counters(module, num_steps - 1), num_steps, second_order)


def _drive(counters: list[InnerStep], num_steps: int, second_order: bool | None) -> Iterator[int]:
    # A loop that an exception left is suspended while its traceback is held: the newer loop takes
    # the layers over, and only one that is resumed after that is refused.
    before = [counter.index for counter in counters]
    loop = _Loop(second_order)
    for counter in counters:
        counter.loop = loop
    finished = False
    try:
        for step in range(num_steps):
            if any(counter.loop is not loop for counter in counters):
                raise RuntimeError(
                    f"inner step {step}: another inner_steps loop has begun on this model before "
                    "this one ended; loops over one model cannot be nested, use a copy of it"
                )
            for counter in counters:
                counter.index = step
            yield step
        finished = True
    finally:
        for counter, index in zip(counters, before, strict=True):
            if counter.loop is loop:
                counter.loop = None
                counter.index = counter.index if finished else index


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
        As :func:`inner_steps`.
    """
    step = checked_count("step", step, least=0)
    with fixed_at(checked_counters(module, step), step):
        yield


@contextmanager
def fixed_at(counters: list[InnerStep], step: int) -> Iterator[None]:
    """Runs the forwards inside the ``with`` block with these counters at ``step``."""
    with steps_restored(counters):
        for counter in counters:
            counter.index, counter.fixed = step, True
        yield


@contextmanager
def with_order(counters: list[InnerStep], second_order: bool) -> Iterator[None]:
    """Tells the layers of these counters whether gradients of gradients will be asked for."""
    before = [counter.second_order for counter in counters]
    try:
        for counter in counters:
            counter.second_order = second_order
        yield
    finally:
        for counter, earlier in zip(counters, before, strict=True):
            counter.second_order = earlier


@contextmanager
def steps_restored(counters: list[InnerStep]) -> Iterator[None]:
    """Puts the inner steps back on exit, however the block ends."""
    before = [(counter, counter.index, counter.loop, counter.fixed) for counter in counters]
    try:
        yield
    finally:
        for counter, index, loop, fixed in before:
            counter.index, counter.loop, counter.fixed = index, loop, fixed
