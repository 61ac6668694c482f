"""torch's vmap is asked, not trusted: a model's first tasks are run at once and each alone.

Some of its rules are wrong without a word (2.13: ``grid_sample``, whose output comes with two
dimensions swapped, hooks of tensors, which are not called), and what a forward does by strides or
writes through views means something else there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.fast_kernels import check_second_derivatives
from mamlpp_ext.task_batch.adapted_model import AdaptedModel, Params
from mamlpp_ext.task_batch.batch import Tasks
from mamlpp_ext.task_batch.difference import Measured, difference
from mamlpp_ext.task_batch.generators import Generators
from mamlpp_ext.task_batch.settings import Settings
from mamlpp_ext.task_batch.state import State, changed_names, contents, flags_of
from mamlpp_ext.task_batch.step import TaskStep, Way
from mamlpp_ext.task_batch.ways import alone, by_vmap, by_vmap_of_gradient, cannot_run

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


# What was found of a model, for each of its modes and orders of derivatives.
_FOUND: WeakKeyDictionary[nn.Module, dict[Any, Way]] = WeakKeyDictionary()


def way_for(model: AdaptedModel, settings: Settings, tasks: Tasks, size: int) -> Way:
    """Returns how to run ``size`` tasks of this model at once.

    One alone is not tried first: a forward may leave behind what nobody can put back.

    Raises:
        RuntimeError: if vmap cannot run it or computes something else than for each task alone, if
            tasks go by what those before left in the model, or torch has no second derivative of
            something in it.
    """
    known = _FOUND.setdefault(model.model, {})
    functions = (settings.loss_fn, settings.inner_loss_fn)
    # Not the functions themselves: a lambda is another one in every iteration.
    codes = tuple(getattr(f, "__code__", type(f)) for f in functions)
    key = (size > 1, settings.second_order, codes, model.mode(), flags_of(model.modules))
    if key not in known and size == 1:
        model.confirm = partial(known.__setitem__, key, alone)
        return alone
    if key not in known:
        with _left_as_it_was(model, tasks.tensors) as numbers:
            known[key] = _tried(model, settings, tasks, numbers)
    return known[key]


def _tried(model: AdaptedModel, settings: Settings, tasks: Tasks, numbers: _Numbers) -> Way:
    with _without_dropout(model.modules):
        singles, both = [*islice(tasks.in_chunks(1), 2)], next(tasks.in_chunks(2))
        expected = _in_turn(model, settings, singles, numbers)
        repeatable = not numbers.were_used()
        objections: list[Exception | str] = []
        for way in (by_vmap, by_vmap_of_gradient):
            try:
                different = difference(_measured(model, settings, both, way), expected)
                if different is None or not repeatable:
                    return way
                if _agrees_elsewhere(model, settings, singles, both, way):
                    return way
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                objections.append(error)
                if isinstance(error.__cause__ or error, RuntimeError):
                    continue  # of vmap's rules
                break
            objections.append(f"it computes something else than each alone, {different}")
    raise cannot_run(objections[0])


def _agrees_elsewhere(
    model: AdaptedModel, settings: Settings, singles: Sequence[Tasks], both: Tasks, way: Way
) -> bool:
    """Returns whether tasks at once are as each alone from other weights nearby.

    Rounding may take a value over a kink, and gradients with it; a wrong rule is wrong everywhere.
    """
    for place in range(1, 4):
        expected = _joined(_measured(model, settings, single, alone, place) for single in singles)
        if difference(_measured(model, settings, both, way, place), expected) is None:
            return True
    return False


def _moved(model: AdaptedModel, adapted: Params, place: int) -> Params:
    """Returns weights a little away from these, the same ones every time for a ``place``."""
    drawn, moved = torch.Generator().manual_seed(place), {}
    for name, weight in adapted.items():
        noise = torch.randn(model.initial[name].shape, generator=drawn).to(weight)
        moved[name] = (weight.detach() * (1 + 0.01 * noise)).requires_grad_(weight.requires_grad)
    return moved


def _in_turn(
    model: AdaptedModel, settings: Settings, singles: Sequence[Tasks], numbers: _Numbers
) -> Measured:
    """Returns what is measured of two tasks, one after the other.

    Raises:
        RuntimeError: if a task goes by what another has left behind, or goes on with it.
    """

    def run(i: int) -> Measured:
        numbers.put_back()
        return _measured(model, settings, singles[i], alone)

    first, second = run(0), run(1)
    # And the first after another, and after itself.
    carried, once = run(0), contents(model.model)
    again, twice = run(0), contents(model.model)
    left = changed_names(once, twice)
    if left or difference(carried, first) or difference(again, first):
        where = f"in {listing(left)}" if left else "(in an object, or outside of the model)"
        raise RuntimeError(
            f"the forward leaves something behind {where} that the next one goes by or goes on "
            "with, and of several tasks at once none comes after another; pass chunk_size=1 to run "
            "the tasks one by one"
        )
    return _joined([first, second])


def _joined(each: Iterable[Measured]) -> Measured:
    kinds = zip(*each, strict=True)
    return [[torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in kinds]


def _measured(
    model: AdaptedModel, settings: Settings, tasks: Tasks, way: Way, place: int = 0
) -> Measured:
    """Returns losses, statistics, gradients and second derivatives of a step, each [T, ...].

    At the model's weights, or at one of the places nearby.
    """
    one_step = TaskStep(model, settings, 0, tasks.single() if way is alone else tasks, way)
    adapted = model.initial_of(len(tasks), alone=way is alone)
    if place:
        adapted = _moved(model, adapted, place)
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


class _Numbers(Generators):
    """Where the generators stand, Python's own among them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._plain = random.getstate()

    def put_back(self) -> None:
        super().put_back()
        random.setstate(self._plain)

    def were_used(self) -> bool:
        return super().were_used() or random.getstate() != self._plain


@contextmanager
def _left_as_it_was(model: AdaptedModel, tensors: Sequence[Tensor]) -> Iterator[_Numbers]:
    """Puts back buffers and random numbers; after a failure attributes, too.

    What a forward makes once (a mask, hooks and the flag that says so) may stay.
    """
    start, numbers = State(model.modules, every=True), _Numbers(tensors)
    try:
        yield numbers
    except BaseException:
        start.put_back()
        raise
    else:
        start.put_back_buffers()
    finally:
        numbers.put_back()
