"""An ``nn.Sequential`` that computes what follows each other in it as one, where nobody looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import Layers
from mamlpp_ext.norm.batch_norm import PerStepBatchNorm2d
from mamlpp_ext.norm.run import Features, Run
from mamlpp_ext.torch_private import (
    forward_mode_active,
    global_hooks,
    has_operators,
    is_called_plainly,
    modes_active,
    only_vmap_active,
    transforms_active,
)

_LEAST = 1000  # values of an input for which looking for runs is worth its Python
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d)
}


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that computes runs of its layers as one, where nobody can look between.

    A run is a ``Conv2d``, the :class:`PerStepBatchNorm2d` behind it (while that normalises by the
    batch), and a ``ReLU`` or ``LeakyReLU`` and a ``MaxPool2d`` that may follow. Inside of a run and
    between two, feature maps lie in the layout that is fastest or are not written at all. What goes
    in and what comes out, the values and all derivatives, is as ``nn.Sequential`` has it but for
    rounding, in memory laid out as torch does.

    Layers that somebody watches or has changed (hooks, subclasses, parametrizations, a wrapped
    ``forward``) are called one by one. So are all of them while a mode of torch's is on
    (``TorchFunctionMode``, autocast, tracing) or a transform other than ``vmap``; for tensors that
    are not float32 or float64 in torch's default layout; and elsewhere than on a CPU (but for
    convolutions under ``vmap`` on a GPU).

    :func:`convert_batchnorm` makes it of every ``nn.Sequential`` with such a run. It has the same
    arguments, children and ``state_dict``; ``layer.__class__ = torch.nn.Sequential`` undoes it.

    Shape:
        - input and output: as the layers'

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = mpp.FusedSequential(
        ...     nn.Conv2d(1, 8, 3), mpp.PerStepBatchNorm2d(8, num_steps=5), nn.ReLU(),
        ...     nn.MaxPool2d(2))
        >>> net(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5, 8, 13, 13])

    Source:
        The derivatives of torch's own layers; what is gained is in ``benchmarks/README.md``.
    """

    # Of a model that higher has patched, whose layers take their parameters as they are called:
    # whether these are up to date before that. The adapter sees to it.
    has_current_parameters = False

    def forward(self, input: Any) -> Any:
        """Calls the layers one after the other.

        Args:
            input: what the first takes.

        Returns:
            What the last returns.
        """
        small = isinstance(input, Tensor) and input.numel() < _LEAST and not transforms_active()
        if small or not _is_unwatched(input):
            return super().forward(input)  # type: ignore[no-untyped-call]
        return self._through(Features(input)).shown()

    def _through(self, features: Features) -> Features:
        layers: list[Any] = list(self)
        place = 0
        while place < len(layers):
            layer, run = layers[place], self._run_at(layers[place : place + 4])
            computed = None if run is None else run.compute(features)
            if computed is None:
                nested = self._kind(layer) is FusedSequential and is_called_plainly(layer)
                found = layer._through(features) if nested else Features(layer(features.shown()))
                computed = found, 1
            features, length = computed
            place += length
        return features

    def _kind(self, layer: Any) -> type:
        """Returns whose forward the layer has."""
        kind = type(layer)
        if self.has_current_parameters and kind.__module__ == "higher.patch":
            return kind.__mro__[1]  # what higher has made it of
        return kind

    def _run_at(self, layers: Sequence[Any]) -> Run | None:
        """Returns the run that begins with the first of the layers."""
        conv, norm, *others = [*layers, None][:4]
        if not self._is_torchs(conv, nn.Conv2d) or self._kind(norm) is not PerStepBatchNorm2d:
            return None
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return None
        if not is_called_plainly(norm):
            return None
        slope, pooling, length = None, None, 2
        for layer in others:
            leaky = self._is_torchs(layer, nn.LeakyReLU) and layer.negative_slope >= 0
            if slope is None and (leaky or self._is_torchs(layer, nn.ReLU)):
                slope = layer.negative_slope if leaky else 0.0
            elif pooling is None and self._is_torchs(layer, nn.MaxPool2d) and _arguments(layer):
                pooling = _arguments(layer)
            else:
                break
            length += 1
        return Run(conv, norm, Layers(norm.eps, slope, pooling), length)

    def _is_torchs(self, layer: Any, kind: type[nn.Module]) -> bool:
        unchanged = self._kind(layer) is kind and kind.forward is _FORWARDS[kind]
        return unchanged and is_called_plainly(layer)


def _is_unwatched(x: Any) -> bool:
    """Returns whether nothing of torch's is on that sees, or has to see, each layer's call."""
    return not (
        not isinstance(x, Tensor)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or modes_active()
        or global_hooks()
        or not has_operators()
        or forward_mode_active()
        or torch.is_autocast_enabled(x.device.type)
        or not only_vmap_active()
    )


def _arguments(layer: nn.MaxPool2d) -> tuple[Any, ...] | None:
    """Returns those of ``F.max_pool2d``, each a pair, if it is given numbers and no indices."""
    sides = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    pairs: list[Any] = [(n, n) if isinstance(n, int) else n for n in sides]
    numbers = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs)
    return (*pairs, layer.ceil_mode) if numbers and not layer.return_indices else None
