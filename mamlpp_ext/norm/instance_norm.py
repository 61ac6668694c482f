"""Instance norm with running statistics, weights and biases of its own for every inner step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.checks import ExtraSteps
from mamlpp_ext.fast_kernels import normalize
from mamlpp_ext.norm.made_class import Made, made_class
from mamlpp_ext.norm.running_statistics import RunningStatistics
from mamlpp_ext.norm.tables import current_place, table_of
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import held

_SPATIAL: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}
_TABLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class PerStepInstanceNorm(Made, RunningStatistics):
    """What an ``nn.InstanceNorm`` with running statistics becomes.

    In training mode each instance is normalised by itself, and the row's running statistics take in
    the mean over the instances of their means and unbiased variances, as torch's do; in eval mode
    the row's statistics normalise.
    """

    _prefix = "PerStep"
    eps: float
    extra_steps: ExtraSteps
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Normalises ``input`` with the row of the current inner step.

        Args:
            input: [N, C, ...] or [C, ...], C = ``num_features``.

        Returns:
            The same shape and dtype.

        Raises:
            RuntimeError: within a backward, unless inside :func:`at_step`.
            ValueError: for another rank or number of channels, a single value per instance where
                their statistics are needed, or an inner step beyond the rows.
        """
        spatial = _SPATIAL[self.made_of[1]]
        alone = input.dim() == spatial + 1
        x = input.unsqueeze(0) if alone else input
        if x.dim() != spatial + 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects {spatial + 1} or {spatial + 2} dimensions, of "
                f"which the channels are {self.num_features}, got input of shape "
                f"{tuple(input.shape)}; reshape it"
            )
        output = self._normalized(x, current_place(self))
        return output.squeeze(0) if alone else output

    def _normalized(self, x: Tensor, row: int) -> Tensor:
        weight = None if self.weight is None else self.weight.select(0, row)
        bias = None if self.bias is None else self.bias.select(0, row)
        frozen = self.inner_step.frozen
        if not (self.training or frozen):
            mean, var = self.running_mean[row], self.running_var[row]  # type: ignore[index]
            return normalize(x, mean, var, weight, bias, self.eps)
        if x[0, 0].numel() < 2:
            raise ValueError(
                f"{type(self).__name__} needs more than 1 value per channel of an instance in "
                f"training, got input of shape {tuple(x.shape)}; give it larger ones, or call "
                ".eval() to normalise by running statistics"
            )
        if self.training and not frozen:
            self._record(row, *_statistics(x))
        # Weight and bias outside: with both inside, vmap's rule for batch norm, which this is made
        # of, gives wrong meta-gradients (torch 2.13).
        output = F.instance_norm(x, eps=self.eps)
        column = (1, -1, *[1] * (x.dim() - 2))
        output = output if weight is None else output * weight.view(column)
        output = output if bias is None else output + bias.view(column)
        return output.to(x.dtype)

    def extra_repr(self) -> str:
        """Returns the settings for ``repr``."""
        rows = f"num_steps={self.num_steps}, extra_steps={self.extra_steps!r}"
        return f"{super().extra_repr()}, {rows}"


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns means and unbiased variances, averaged over the instances ``x``, each [C]."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    return x.mean((0, 2)), x.var(2).mean(0)


def is_instance_norm(layer: nn.Module) -> bool:
    """Returns whether it is one of torch's with running statistics, not of a subclass."""
    return type(layer) in _SPATIAL and layer.running_mean is not None


def become_per_step_instance_norm(
    layer: Any, num_steps: int, extra_steps: ExtraSteps, inner_step: InnerStep
) -> None:
    """Gives an instance norm with running statistics rows, in place."""
    parameters, buffers = held(layer, "parameters"), held(layer, "buffers")
    for name in _TABLES:
        own = parameters if name in parameters else buffers
        t = own.get(name)
        if isinstance(t, nn.Parameter):
            own[name] = nn.Parameter(table_of(t, num_steps), t.requires_grad)
        elif t is not None:
            own[name] = table_of(t, num_steps)
    layer.__class__ = made_class(PerStepInstanceNorm, type(layer))
    # Without a momentum torch's own (2.13) never moves its statistics; nor does this.
    layer.momentum = layer.momentum or 0.0
    vars(layer).update(num_steps=num_steps, extra_steps=extra_steps, inner_step=inner_step)
