"""Layers that add to BatchNorm, such as timm's ``BatchNormAct2d``, with a row for every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import ExtraSteps
from mamlpp_ext.norm.base import PerStepBatchNorm
from mamlpp_ext.norm.batch_norm import (
    PerStepBatchNorm1d,
    PerStepBatchNorm2d,
    PerStepBatchNorm3d,
)
from mamlpp_ext.norm.made_class import Made, made_class
from mamlpp_ext.norm.tables import table_of
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import held

_NOTHING = object()


class Added(Made, PerStepBatchNorm):
    """Per-step batch norm, and behind it what a subclass of BatchNorm adds.

    The subclass's own forward, as it is, with its batch norm made the identity: in eval mode, of
    mean 0 and variance 1, without weight and bias. That this comes to the same is tried at
    conversion, by :func:`check_only_adds`.
    """

    _prefix = "PerStep"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalises ``input`` as the per-step layer, then does what the subclass does."""
        output = PerStepBatchNorm.forward(self, input)  # before it may stand a reader of rows
        with _identity(self, output):
            return self.made_of[1].forward(self, output, *args, **kwargs)


class _Added1d(Added, PerStepBatchNorm1d):
    """For subclasses of ``nn.BatchNorm1d``."""


class _Added2d(Added, PerStepBatchNorm2d):
    """For subclasses of ``nn.BatchNorm2d``."""


class _Added3d(Added, PerStepBatchNorm3d):
    """For subclasses of ``nn.BatchNorm3d``."""


_MIXINS: dict[type[nn.Module], type[Added]] = {
    nn.BatchNorm1d: _Added1d,
    nn.BatchNorm2d: _Added2d,
    nn.BatchNorm3d: _Added3d,
}


@contextmanager
def _identity(layer: Any, like: Tensor) -> Iterator[None]:
    """Makes the batch norm of torch's in a layer hand on what it is given."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    mean = like.new_zeros(layer.num_features, dtype=dtype)
    instead = {
        "training": False,
        "running_mean": mean,
        "running_var": mean + (1 - layer.eps),
        "weight": None,
        "bias": None,
    }
    about = vars(layer)  # what stands here hides parameters and buffers of the same names
    before = {name: about.get(name, _NOTHING) for name in instead}
    about.update(instead)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _NOTHING:
                del about[name]
            else:
                about[name] = value


def adds_to_batch_norm(layer: nn.Module) -> bool:
    """Returns whether it is of a subclass of ``nn.BatchNorm1d``, ``2d`` or ``3d``."""
    return isinstance(layer, tuple(_MIXINS)) and type(layer) not in _MIXINS


def become_per_step(layer: Any, num_steps: int, extra_steps: ExtraSteps) -> PerStepBatchNorm:
    """Gives a layer of a subclass rows, in place."""
    (mixin,) = (mixin for base, mixin in _MIXINS.items() if isinstance(layer, base))
    parameters, buffers = held(layer, "parameters"), held(layer, "buffers")
    for name in ("weight", "bias"):
        p = parameters.get(name)
        if p is not None:
            parameters[name] = nn.Parameter(table_of(p, num_steps), p.requires_grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if buffers.get(name) is not None:
            buffers[name] = table_of(buffers[name], num_steps)
    names = tuple(name for name in ("weight", "bias") if parameters.get(name) is not None)
    vars(layer).update(
        inner_step=InnerStep(), num_steps=num_steps, extra_steps=extra_steps, per_step_names=names
    )
    layer.__class__ = made_class(mixin, type(layer))
    return layer  # type: ignore[no-any-return]


def check_only_adds(layer: Any, where: str) -> None:
    """Says if a subclass of BatchNorm would come to something else as a per-step layer.

    Both are tried on noise, with other numbers in place of the initial ones: outputs, gradients and
    statistics, in train and in eval mode.

    Raises:
        ValueError: if it would, or cannot be tried.
    """
    try:
        with torch.random.fork_rng(_devices(layer)), torch.enable_grad():
            difference = _difference(layer)
    except Exception as error:
        difference = f"it cannot be tried on noise ({type(error).__name__}: {error})".rstrip(".")
    if difference:
        raise ValueError(
            f"{where} cannot be expressed per step: a subclass of BatchNorm can where it computes "
            f"batch norm and then something more, and here {difference}; replace it with the "
            "BatchNorm it is made of and a module behind that"
        )


def _difference(layer: Any) -> str:
    """Returns where the two differ; empty if nowhere."""
    original = copy.deepcopy(layer).requires_grad_(True)
    if any(t.is_meta for t in (*original.parameters(), *original.buffers())):
        return "it has no values yet (device 'meta')"
    with torch.no_grad():
        for name, tensor in (*original.named_parameters(), *original.named_buffers()):
            if tensor.is_floating_point():
                (tensor.uniform_(0.5, 1.5) if name == "running_var" else tensor.normal_(1.0, 0.3))
    original = original.float() if _is_half(original) else original
    tried = False
    for shape in _shapes(layer):
        for training in (True, False):
            first = copy.deepcopy(original).train(training)
            second = become_per_step(copy.deepcopy(original), 1, "error").train(training)
            try:
                expected = _measured(first, shape)
            except (RuntimeError, ValueError, AssertionError):
                continue  # not of a rank that it takes
            found, tried = _measured(second, shape), True
            for name, want in expected.items():
                if name not in found or not _near(found[name], want):
                    return f"{name} in {'train' if training else 'eval'} mode would be another"
    return "" if tried else "it takes no input of the shapes that BatchNorm takes"


def _shapes(layer: Any) -> list[tuple[int, ...]]:
    shapes = {
        nn.BatchNorm1d: ((7,), (4, 5)),
        nn.BatchNorm2d: ((4, 5, 3),),
        nn.BatchNorm3d: ((4, 3, 2, 3),),
    }
    (sizes,) = (sizes for base, sizes in shapes.items() if isinstance(layer, base))
    return [(n, layer.num_features, *rest) for n, *rest in sizes]


def _measured(layer: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns the output, the gradients and the statistics of one forward on noise."""
    torch.manual_seed(0)
    state = [*layer.parameters(), *layer.buffers()]
    like = next((t for t in state if t.is_floating_point()), torch.empty(0))
    x = torch.randn(shape, dtype=like.dtype, device=like.device).mul_(2).add_(1).requires_grad_()
    output = layer(x.clone())  # which may be written to
    wanted = {"the gradient of its input": x, **dict(layer.named_parameters())}
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    loss = (output * weights.view_as(output)).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {"its output": output, **dict(layer.named_buffers())}
    return found | {
        f"the gradient of {name}" if name in dict(layer.named_parameters()) else name: g
        for name, g in zip(wanted, grads, strict=True)
        if g is not None
    }


def _near(found: Tensor, want: Tensor) -> bool:
    if found.dtype != want.dtype or found.numel() != want.numel():
        return False
    apart = (found.double() - want.double().view_as(found)).abs().max()
    scale = 1 + want.double().abs().max()
    return bool(apart <= (1e-9 if want.dtype == torch.float64 else 1e-4) * scale)


def _is_half(layer: nn.Module) -> bool:
    return any(t.dtype in (torch.float16, torch.bfloat16) for t in layer.parameters())


def _devices(layer: nn.Module) -> list[int]:
    return sorted({t.get_device() for t in layer.parameters() if t.is_cuda})
