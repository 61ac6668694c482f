"""Turns the BatchNorm layers of a model into per-step ones."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from mamlpp_ext.checks import ExtraSteps
from mamlpp_ext.norm.base import PerStepBatchNorm
from mamlpp_ext.norm.batch_norm import (
    PerStepBatchNorm1d,
    PerStepBatchNorm2d,
    PerStepBatchNorm3d,
)
from mamlpp_ext.norm.batch_norm_subclass import (
    adds_to_batch_norm,
    become_per_step,
    check_only_adds,
)
from mamlpp_ext.norm.frozen import FrozenBatchNorm
from mamlpp_ext.norm.fused_sequential import FusedSequential
from mamlpp_ext.norm.references import copied, follow
from mamlpp_ext.norm.tables import checked_settings
from mamlpp_ext.steps import InnerStep, per_step_layers
from mamlpp_ext.torch_private import held, is_batch_norm, is_hooked

_LOGGER = logging.getLogger(__name__)
_REPLACEMENTS: dict[type[nn.Module], type[PerStepBatchNorm]] = {
    nn.BatchNorm1d: PerStepBatchNorm1d,
    nn.BatchNorm2d: PerStepBatchNorm2d,
    nn.BatchNorm3d: PerStepBatchNorm3d,
}


def convert_batchnorm(
    module: nn.Module, num_steps: int, *, extra_steps: ExtraSteps = "error"
) -> nn.Module:
    """Returns a copy of ``module`` whose BatchNorm layers have a row for every inner step.

    The copy computes what the original does until it is trained: every row starts with the trained
    weights, biases and statistics. A layer shared between several places stays shared. Mode,
    ``requires_grad``, dtype and device are kept. As with ``convert_sync_batchnorm``, make the
    optimizer afterwards, from the copy's parameters. An ``nn.Sequential`` with a convolution and
    its norm becomes a :class:`FusedSequential`, which computes the same quicker.

    Args:
        module: a model with ``nn.BatchNorm1d``, ``2d`` or ``3d`` layers, or such a layer; it is
            left as it is.
        num_steps: the number of inner steps, i.e. rows.
        extra_steps: what happens at steps beyond ``num_steps``: ``"error"`` raises, ``"last"``
            reuses the last row. ``convert_batchnorm(net, 1, extra_steps="last")`` is the plain
            BatchNorm, one row for all steps.

    Returns:
        The converted copy.

    Raises:
        TypeError: if ``module`` is no module or ``num_steps`` no whole number.
        ValueError: if ``num_steps`` is below 1, no layer can be converted, or one cannot be
            expressed: ``SyncBatchNorm``, lazy ones, subclasses that do not only add to it (as
            timm's ``BatchNormAct2d`` does), layers with hooks or with parameters tied to another
            layer's, models inside :func:`frozen_statistics`, and models that hold adapted weights
            instead of parameters.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8))
        >>> convert_batchnorm(net, num_steps=5)[1].weight.shape
        torch.Size([5, 8])

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4 (BNRS and BNWB).
    """
    settings = checked_settings("convert_batchnorm", module, num_steps, extra_steps)
    check_convertible(module)
    # The surgery works on the copy: a failure leaves no trace.
    return convert_copy(copied(module), *settings)


def convert_copy(
    converted: nn.Module, num_steps: int, extra_steps: ExtraSteps, inner_step: InnerStep
) -> nn.Module:
    """Gives the BatchNorm layers of a model rows, in place; returns it, or what it is now."""
    replaced: dict[int, PerStepBatchNorm] = {}
    for name, layer in list(converted.named_modules()):
        if is_batch_norm(layer):
            give = become_per_step if adds_to_batch_norm(layer) else _per_step
            replaced[id(layer)] = give(layer, num_steps, extra_steps)
            replaced[id(layer)].inner_step = inner_step
            _LOGGER.info("%s -> %s", name or "(root)", replaced[id(layer)])
    for parent in list(converted.modules()):
        children = held(parent, "modules")
        for name, child in children.items():  # a shared child stands here several times
            if id(child) in replaced:
                children[name] = replaced[id(child)]
    follow(converted, dict(replaced))
    _fuse(converted)
    return replaced.get(id(converted), converted)


def _fuse(module: nn.Module) -> None:
    """Lets every ``nn.Sequential`` with a convolution and its norm compute them as one."""
    for layer in reversed(list(module.modules())):  # what is inside of others first
        if type(layer) is not nn.Sequential:
            continue
        children = list(layer)
        pairs = itertools.pairwise(children)
        has_run = any(
            isinstance(a, nn.Conv2d) and isinstance(b, PerStepBatchNorm2d) for a, b in pairs
        )
        if has_run or any(isinstance(child, FusedSequential) for child in children):
            layer.__class__ = FusedSequential


def check_convertible(module: nn.Module) -> None:
    """Says why the BatchNorm layers of a model cannot be converted, if they cannot.

    Raises:
        ValueError: if so.
    """
    every = (held(layer, "parameters").values() for layer in module.modules())
    holders = Counter(id(p) for params in every for p in params)
    norms = {name: layer for name, layer in module.named_modules() if is_batch_norm(layer)}
    for name, layer in norms.items():
        params = [p for p in held(layer, "parameters").values() if p is not None]
        tied = any(holders[id(p)] > 1 for p in params)
        _check_layer(layer, f"'{name or '(root)'}' ({type(layer).__name__})", tied=tied)
    if not norms:
        done = per_step_layers(module)
        found = "only per-step layers: it is converted already" if done else "none"
        raise ValueError(
            f"{type(module).__name__} has no nn.BatchNorm1d, 2d or 3d layer to convert ({found}); "
            "leave this call out: the other parts of MAML++ work without it"
        )


def _check_layer(layer: Any, where: str, tied: bool) -> None:
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(
            f"{where} is lazy and has no channels yet; run the model once on a batch of the "
            "right shape, then convert it"
        )
    if isinstance(layer, FrozenBatchNorm):
        raise ValueError(
            f"{where} is inside frozen_statistics; convert the model before that context"
        )
    if (layer.running_mean is None) == layer.track_running_stats:
        raise ValueError(
            f"{where} has track_running_stats={layer.track_running_stats} "
            f"{'without' if layer.running_mean is None else 'with'} running buffers; make the "
            "flag and the buffers agree first"
        )
    if not any(isinstance(layer, kind) for kind in _REPLACEMENTS):
        raise ValueError(
            f"{where} cannot be expressed per step, only nn.BatchNorm1d, 2d and 3d can; replace it "
            "with one of these first"
        )
    if tied:
        raise ValueError(
            f"{where} shares its weight or bias with another layer, and the rows of two "
            "layers cannot be tied; give it parameters of its own first"
        )
    if adds_to_batch_norm(layer):
        check_only_adds(layer, where)
    elif is_hooked(layer):
        raise ValueError(
            f"{where} has hooks, which would be lost; remove them and register them on the "
            "converted layer"
        )


def _per_step(layer: Any, num_steps: int, extra_steps: ExtraSteps) -> PerStepBatchNorm:
    buffers = held(layer, "buffers")
    state = {**held(layer, "parameters"), **buffers}
    like = next((t for t in state.values() if t is not None), torch.empty(0))
    new = _REPLACEMENTS[type(layer)](
        layer.num_features,
        num_steps,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        extra_steps=extra_steps,
        device=like.device,
        dtype=like.dtype if like.is_floating_point() else None,
    )
    if layer.bias is None:  # torch's bias=False
        new.register_parameter("bias", None)
    for name, buffer in buffers.items():
        if buffer is not None:  # statistics in float32 beside weights in half precision stay so
            setattr(new, name, getattr(new, name).to(buffer.dtype))
    new.load_state_dict(layer.state_dict())  # spreads each [C] tensor over the rows
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    return new.train(layer.training)
