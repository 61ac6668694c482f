"""torch's vmap is asked, not trusted: a model's first tasks are run at once and each alone.

Some of its rules are wrong without a word (2.13: ``grid_sample``, whose output comes with two
dimensions swapped, hooks of tensors, which are not called), and what a forward does by strides or
writes through views means something else there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mamlpp_ext.fast_kernels import check_second_derivatives
from mamlpp_ext.task_batch.adapted_model import AdaptedModel
from mamlpp_ext.task_batch.batch import Tasks
from mamlpp_ext.task_batch.settings import Settings
from mamlpp_ext.task_batch.step import TaskStep, Way
from mamlpp_ext.task_batch.ways import alone, by_vmap, by_vmap_of_gradient, cannot_run

# What was found of a model, for each of its modes and orders of derivatives.
_FOUND: WeakKeyDictionary[nn.Module, dict[Any, Way]] = WeakKeyDictionary()

# How far rounding may take two ways apart, as shares of a tensor's largest value and of that of all
# (a gradient may be nothing but rounding): through kinks and a second derivative it comes to many
# times its own size. What is wrong is wrong by half.
_ROUNDING = {torch.float64: (1e-5, 1e-8), torch.float32: (0.03, 3e-5)}
_COARSE = (0.3, 0.1)

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# Losses and outputs, statistics, gradients, second derivatives.
Measured = list[list[Tensor]]


def way_for(model: AdaptedModel, settings: Settings, tasks: Tasks, size: int) -> Way:
    """Returns how to run ``size`` tasks of this model at once.

    Raises:
        RuntimeError: if vmap cannot run it or computes something else than for each task alone, or
            torch has no second derivative of something in it.
    """
    found = _FOUND.setdefault(model.model, {})
    functions = (settings.loss_fn, settings.inner_loss_fn)
    # Not the functions themselves: a lambda is another one in every iteration.
    codes = tuple(getattr(f, "__code__", type(f)) for f in functions)
    key = (size > 1, settings.second_order, codes, model.mode())
    if key not in found:
        with _left_as_it_was(model, tasks.tensors):
            if size > 1:
                found[key] = _tried(model, settings, tasks)
            else:
                if settings.second_order:  # or a derivative that torch lacks comes as its own words
                    _measured(model, settings, tasks.of([t[:1] for t in tasks.tensors]), alone)
                found[key] = alone
    return found[key]


def _tried(model: AdaptedModel, settings: Settings, tasks: Tasks) -> Way:
    singles = [tasks.of([t[i : i + 1] for t in tasks.tensors]) for i in range(min(len(tasks), 2))]
    with _without_dropout(model.modules):
        each = [_measured(model, settings, single, alone) for single in singles]
        again = _measured(model, settings, singles[0], alone)
        repeatable = _difference(again, each[0]) is None  # nothing else in it is drawn anew
        expected: Any = [_joined(kind) for kind in zip(*each, strict=True)]
        both = tasks.of([t[:2] for t in tasks.tensors])
        objections: list[Exception | str] = []
        for way in (by_vmap, by_vmap_of_gradient):
            try:
                different = _difference(_measured(model, settings, both, way), expected)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                objections.append(error)
                if isinstance(error.__cause__ or error, RuntimeError):
                    continue  # of vmap's rules
                break
            if different is None or not repeatable:
                return way
            objections.append(f"it computes something else than each alone, {different}")
    raise cannot_run(objections[0])


def _joined(each: Sequence[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def _measured(model: AdaptedModel, settings: Settings, tasks: Tasks, way: Way) -> Measured:
    """Returns losses, statistics, gradients and second derivatives of a step, each [T, ...]."""
    one_step = TaskStep(model, settings, 0, tasks.single() if way is alone else tasks, way)
    adapted = model.initial_of(len(tasks), alone=way is alone)
    with torch.enable_grad(), model.at(0, settings.second_order):
        losses, outputs, statistics = one_step.support_losses(adapted)
        order = settings.second_order
        grads = model.gradients(losses, adapted, with_graph=order, first=True)
        if order:
            check_second_derivatives(grads.values())
        # Whether a gradient arrives may depend on the task's data.
        reached = [adapted[n].new_zeros(()) if g is None else g for n, g in grads.items()]
        reached = [g.to_dense().expand_as(adapted[n]) for n, g in zip(grads, reached, strict=True)]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in reached]
        value = sum((g.square().sum() for g in real), losses.new_zeros(()))
        wanted = [adapted[name] for name in model.adapting]
        second = [torch.zeros_like(t) for t in wanted]
        if order and value.requires_grad:
            further = torch.autograd.grad(value, wanted, allow_unused=True)
            pairs = zip(further, second, strict=True)
            second = [zero if found is None else found.to_dense() for found, zero in pairs]
    kinds = [[losses, *outputs], statistics, reached, second]
    return [[t.detach()[None] if way is alone else t.detach() for t in kind] for kind in kinds]


def _difference(found: Measured, expected: Measured) -> str | None:
    """Says where two measurements differ by more than rounding, or None."""
    words = ("the losses or outputs", "the statistics", "the gradients", "the second derivatives")
    share, share_of_all = max(_rounding(t) for kind in expected for t in kind)
    for name, ours, theirs in zip(words, found, expected, strict=True):
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            shapes = [[tuple(t.shape) for t in kind] for kind in (ours, theirs)]
            return f"{name} are of shapes {shapes[0]}, not {shapes[1]}"
        largest_of_all = max((_largest(t.nan_to_num(0.0)) for t in theirs), default=0.0)
        for a, b in zip(ours, theirs, strict=True):
            different = (a != b) & ~(a.isnan() & b.isnan())
            apart = _largest((a.to(torch.complex128) - b)[different])
            largest = _largest(b.nan_to_num(0.0))
            if not apart <= share * largest + share_of_all * largest_of_all:
                return f"{name} are {apart:.2g} apart, the largest is {largest:.2g}"
    return None


def _rounding(t: Tensor) -> tuple[float, float]:
    kind = t.device.type
    coarse = torch.is_autocast_enabled(kind) or (t.is_cuda and torch.backends.cudnn.allow_tf32)
    if t.dtype in _ROUNDING and (t.dtype == torch.float64 or not coarse):
        return _ROUNDING[t.dtype]
    return _COARSE if t.is_floating_point() or t.is_complex() else (0.0, 0.0)


def _largest(t: Tensor) -> float:
    return float(t.to(torch.complex128).abs().max()) if t.numel() else 0.0


@contextmanager
def _without_dropout(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Has dropout layers leave everything, so that what else a forward does can be compared."""
    places = [(vars(m), "p" if isinstance(m, _DROPOUTS) else "dropout") for m in modules]
    shares = [(held, name, held[name]) for held, name in places if name in held]
    try:
        for held, name, share in shares:
            held[name] = 0.0 if isinstance(share, float) else share
        yield
    finally:
        for held, name, share in shares:
            held[name] = share


@contextmanager
def _left_as_it_was(model: AdaptedModel, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts buffers and random numbers back as they were."""
    devices = sorted({t.get_device() for t in tensors if t.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices), model.restored_buffers():
            yield
    finally:
        random.setstate(state)
