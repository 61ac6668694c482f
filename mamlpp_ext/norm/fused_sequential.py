"""Convolution, norm, activation and pooling in a row, computed as one where nobody can look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import Pooling
from mamlpp_ext.norm.batch_norm import PerStepBatchNorm2d
from mamlpp_ext.norm.run import Features, Run
from mamlpp_ext.torch_private import (
    forward_mode_active,
    global_hooks,
    is_called_plainly,
    modes_active,
    only_vmap_active,
)

_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.MaxPool2d)
}


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that computes runs of its layers as one, where nobody can look between.

    A run is a ``Conv2d`` and what follows it of a :class:`PerStepBatchNorm2d` in training mode, a
    ``ReLU`` or ``LeakyReLU``, and a ``MaxPool2d``. Between the layers of a run, and between runs,
    feature maps lie in the layout that is fastest and need not be written at all; what goes in and
    what comes out, values and all derivatives, is as ``nn.Sequential`` has it but for rounding, in
    memory laid out as torch does. Layers that somebody watches or has changed (hooks, subclasses,
    parametrizations, a wrapped ``forward``) are called one by one, and so are all of them where a
    mode of torch's (``TorchFunctionMode``, autocast, tracing) or a transform other than ``vmap``
    is on, for tensors that are not float32 or float64 in torch's default layout, and elsewhere than
    on a CPU (but for convolutions under ``vmap`` on a GPU).

    :func:`convert_batchnorm` makes it of every ``nn.Sequential`` with such a run. It has the same
    arguments, children and ``state_dict``.

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
        if not _is_unwatched(input):
            return super().forward(input)  # type: ignore[no-untyped-call]
        return self._through(Features(input)).shown()

    def _through(self, features: Features) -> Features:
        layers: list[Any] = list(self._modules.values())
        place = 0
        while place < len(layers):
            layer, run = layers[place], self._run_at(layers[place : place + 4])
            computed = None if run is None else run.compute(features)
            if computed is not None:
                features, length = computed
                place += length
                continue
            if self._kind(layer) is FusedSequential and is_called_plainly(layer):
                features = layer._through(features)
            else:
                features = Features(layer(features.shown()))
            place += 1
        return features

    def _kind(self, layer: Any) -> type:
        """Returns whose forward the layer has."""
        kind = type(layer)
        if self.has_current_parameters and kind.__module__ == "higher.patch":
            return kind.__mro__[1]  # what higher has made it of
        return kind

    def _run_at(self, layers: Sequence[Any]) -> Run | None:
        """Returns the run that begins with the first of the layers."""
        conv, *others = layers
        if not (self._is_torchs(conv, nn.Conv2d) and conv.padding_mode == "zeros"):
            return None
        if isinstance(conv.padding, str):
            return None
        run = Run(conv)
        for layer in others:
            longer = self._longer(run, layer)
            if longer is None:
                break
            run = longer
        return run

    def _longer(self, run: Run, layer: Any) -> Run | None:
        """Returns the run with this layer, too, or None."""
        length = run.length + 1
        if length == 2 and self._kind(layer) is PerStepBatchNorm2d and is_called_plainly(layer):
            return run._replace(norm=layer, length=length)
        if run.slope is None and self._is_torchs(layer, nn.ReLU):
            return run._replace(slope=0.0, length=length)
        if run.slope is None and self._is_torchs(layer, nn.LeakyReLU):
            rises = layer.negative_slope >= 0
            return run._replace(slope=layer.negative_slope, length=length) if rises else None
        if run.pooling is None and self._is_torchs(layer, nn.MaxPool2d):
            pooling = None if layer.return_indices else _pooling(layer)
            return None if pooling is None else run._replace(pooling=pooling, length=length)
        return None

    def _is_torchs(self, layer: Any, kind: type[nn.Module]) -> bool:
        unchanged = kind.forward is _FORWARDS[kind]
        return self._kind(layer) is kind and unchanged and is_called_plainly(layer)


def _is_unwatched(x: Any) -> bool:
    """Returns whether nothing of torch's is on that sees, or has to see, each layer's call."""
    return not (
        not isinstance(x, Tensor)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or modes_active()
        or global_hooks()
        or forward_mode_active()
        or torch.is_autocast_enabled(x.device.type)
        or not only_vmap_active()
    )


def _pooling(layer: nn.MaxPool2d) -> Pooling | None:
    sides = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    pairs: list[Any] = [(n, n) if isinstance(n, int) else tuple(n) for n in sides]
    if not all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs):
        return None
    kernel_size, stride, padding, dilation = pairs
    return Pooling(kernel_size, stride, padding, dilation, layer.ceil_mode)
