"""Forwards by batch statistics that leave the running ones alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mamlpp_ext.steps import Freeze, step_counters
from mamlpp_ext.torch_private import is_batch_norm


class FrozenBatchNorm(nn.Module):
    """What a plain BatchNorm is inside :func:`frozen_statistics`.

    A class, not flags on the layer: it stays frozen when the model changes between train and eval,
    and ``higher`` patches it as what it is. A copy made inside keeps the class, and is what it was
    once the context ends.
    """

    freeze: Freeze
    kind: type[nn.Module]  # its base, too, and what calls go to
    track_running_stats: bool

    def forward(self, input: Tensor) -> Tensor:
        """Normalises by the batch and keeps no statistics, as long as the context is open."""
        forward: Callable[[Tensor], Tensor] = super().forward
        if not self.freeze.open:
            return forward(input)
        before = self.training, self.track_running_stats
        self.training, self.track_running_stats = True, False
        try:
            return forward(input)
        finally:
            self.training, self.track_running_stats = before


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalises by batch statistics and leaves the running ones alone, in either mode.

    This is how to evaluate transductively, as the paper's code does, without letting the test tasks
    into the running statistics. Plain ``BatchNorm`` layers of ``module`` are treated alike, so that
    a MAML baseline is measured in the same way; for these, enter it before patching the model with
    ``higher``, or give it the patched model. A copy of the model made inside is frozen until the
    context ends.

    Args:
        module: the model, patched or not. Other layers (dropout) keep their mode.

    Raises:
        TypeError: if ``module`` is not a module.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = mpp.PerStepBatchNorm1d(3, num_steps=5)
        >>> with mpp.frozen_statistics(net):
        ...     _ = net(torch.randn(8, 3))
        >>> net.running_mean.abs().sum()
        tensor(0.)

    Source:
        The transductive evaluation of the authors' code for "How to train your MAML", which the
        paper does not speak of.
    """
    counters, freeze = step_counters(module), Freeze()
    plain: list[tuple[nn.Module, type[nn.Module]]] = []
    for layer in module.modules():
        if not isinstance(layer, FrozenBatchNorm):
            plain += [(layer, type(layer))] if is_batch_norm(layer) else []
        elif not layer.freeze.open:  # a copy that outlived its context
            plain.append((layer, layer.kind))
    try:
        for counter in counters:
            counter.freezes.append(freeze)
        for layer, kind in plain:
            about = {"freeze": freeze, "kind": kind}
            layer.__class__ = type(f"Frozen{kind.__name__}", (FrozenBatchNorm, kind), about)
        yield
    finally:
        freeze.open = False
        for counter in counters:
            counter.freezes.remove(freeze)
        for layer, kind in plain:
            layer.__class__ = kind
