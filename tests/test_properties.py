"""What has to hold for every model, not only for those that somebody thought of.

``pytest --hypothesis-profile=deep`` (``make test-deep``) tries many more; see conftest.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

import mamlpp_ext as mpp
from any_model import call, task_of
from mamlpp_ext.fast_kernels.batch_norm import batch_normalize
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference
from random_nets import ADAPT, CHANNELS_LAST, Plan, build, plans, tasks, with_rows

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

Outcome = dict[str, Tensor | None]
Task = tuple[Tensor, ...]


def learner(plan: Plan, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, mpp.LSLR]:
    """The plan's model with rows, no two alike, and rates of either sign."""
    net = with_rows(plan, build(plan, dtype))
    lslr = mpp.LSLR(net, plan.steps, adapt=ADAPT[plan.adapt])
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if "body" in name and tensor.is_floating_point() and tensor.shape[:1] == (plan.steps,):
                tensor.add_(torch.rand_like(tensor) / 4)
        lslr.rates.copy_(0.05 + 0.05 * torch.randn_like(lslr.rates))
    return net, lslr


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Compares by name, relative to the largest number of each tensor; None is zero."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name]
        if want is None or got is None:
            assert all(t is None or t.count_nonzero() == 0 for t in (got, want)), name
            continue
        assert got.shape == want.shape, name
        assert got.dtype == want.dtype, name
        off = (got.double() - want.double()).abs().amax() if want.numel() else torch.zeros(())
        scale = 1 + (want.double().abs().amax() if want.numel() else 0)
        assert off <= tolerance * scale, (name, off.item(), scale.item())


# ---------------------------------------------------------------------------------------------
# Conversion.


@given(plans(), st.booleans(), st.sampled_from([torch.float64, torch.float32]))
def test_conversion_preserves_outputs(plan: Plan, training: bool, dtype: torch.dtype) -> None:
    plain = build(plan, dtype).train(training)
    before = copy.deepcopy(plain.state_dict())
    converted, task = with_rows(plan, plain), task_of(tasks(plan, dtype), 0)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for step in mpp.inner_steps(converted, plan.steps):
        twin = copy.deepcopy(plain)  # each row starts where the plain layer is
        for x in (task[0], task[2]):
            found, expected = call(converted, x), call(twin, x)
            assert_near({"output": found}, {"output": expected}, tolerance)
        rows = converted.state_dict()
        for name, value in twin.state_dict().items():
            table = rows[name]
            row = table[step] if table.dim() > value.dim() else table
            assert_near({name: row}, {name: value}, tolerance)
    assert_near(plain.state_dict(), before, 0.0)
    trainable = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert {name for name, p in converted.named_parameters() if p.requires_grad} == trainable


# ---------------------------------------------------------------------------------------------
# Backends. Each runs all tasks and returns step losses, meta-gradients and statistics.


def loop(net: nn.Module, step: Callable[[Tensor], Any], task: Task, steps: int) -> list[Tensor]:
    losses = []
    for _ in mpp.inner_steps(net, steps):
        step(F.cross_entropy(call(net, task[0]), task[1]))
        losses.append(F.cross_entropy(call(net, task[2]), task[3]))
    return losses


def by_higher(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    with mpp_higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
        return loop(fnet, diffopt.step, task, lslr.num_steps)


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    with mpp_torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
        return loop(net, inner_opt.step, task, lslr.num_steps)


def by_hand(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> list[Tensor]:
    """A plain loop around the pure update."""
    params = dict(net.named_parameters())
    owner = {id(p): name for name, p in params.items()}
    # Each place that holds a parameter, once: named twice, functional_call (torch 2.13) would leave
    # the adapted weights of a module that stands in two places in the model.
    places = {
        f"{path}.{key}": p
        for path, module in net.named_modules()
        for key, p in module._parameters.items()
        if p is not None
    }

    def forward(x: Any) -> Tensor:
        placed = {place: params[owner[id(p)]] for place, p in places.items()}
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        return functional_call(net, placed, args, kwargs, tie_weights=False)

    losses = []
    with mpp.twice_differentiable(net, second_order=order):
        for step in mpp.inner_steps(net, lslr.num_steps):
            loss = F.cross_entropy(forward(task[0]), task[1])
            wanted = [params[name] for name in lslr.names]
            grads = torch.autograd.grad(loss, wanted, create_graph=order, allow_unused=True)
            params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
            losses.append(F.cross_entropy(forward(task[2]), task[3]))
    return losses


def in_turn(run: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def every_task(net: nn.Module, lslr: mpp.LSLR, batch: Task, msl: Any, order: bool) -> Any:
        found = [run(net, lslr, task_of(batch, i), order) for i in range(len(batch[1]))]
        step_losses = torch.stack([torch.stack(losses) for losses in found])
        return msl(step_losses).mean(), step_losses

    return every_task


def at_once(**form: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def task_batch(net: nn.Module, lslr: mpp.LSLR, batch: Task, msl: Any, order: bool) -> Any:
        form_and_order = {"aggregate": msl, "second_order": order, **form}
        result = mpp.task_batch_loss(
            net, lslr, batch, F.cross_entropy, num_steps=lslr.num_steps, **form_and_order
        )
        return result.loss, result.step_losses

    return task_batch


BACKENDS = {
    "higher": in_turn(by_higher),
    "torchopt": in_turn(by_torchopt),
    "task_batch": at_once(),
    "rematerialised": at_once(rematerialize=True),
    "in chunks": at_once(chunk_size=2),
    "one by one": at_once(chunk_size=1),
}


def outcome(run: Any, net: nn.Module, lslr: mpp.LSLR, *args: Any) -> Outcome:
    """Runs on copies, so that the backends can be compared with each other."""
    net, lslr = copy.deepcopy((net, lslr))
    loss, step_losses = run(net, lslr, *args)
    loss.backward()
    learned = [*net.named_parameters(), *lslr.named_parameters()]
    return {
        "loss": loss.detach(),
        "step losses": step_losses.detach(),
        **{f"gradient of {name}": p.grad for name, p in learned},
        **dict(net.named_buffers()),
    }


def aggregate(plan: Plan) -> mpp.MultiStepLoss:
    msl = mpp.MultiStepLoss(plan.steps, 3)
    for _ in range(plan.seed % 5):  # all steps, some more than others, or the last alone
        msl.step()
    return msl


@given(plans(), st.sampled_from(sorted(BACKENDS)), st.booleans(), st.booleans())
def test_every_backend_agrees(plan: Plan, kind: str, second_order: bool, training: bool) -> None:
    net, lslr = learner(plan)
    net.train(training)
    args = (net, lslr, tasks(plan), aggregate(plan), second_order)
    event(f"{kind}, {len(plan.sizes)}d, {'second' if second_order else 'first'} order")
    found, expected = outcome(BACKENDS[kind], *args), outcome(in_turn(by_hand), *args)
    assert_near(found, expected, 1e-7)


@given(plans(most_steps=3), st.sampled_from(sorted(BACKENDS)), st.booleans())
def test_float32_is_near_float64(plan: Plan, kind: str, second_order: bool) -> None:
    exact = outcome(BACKENDS[kind], *learner(plan), tasks(plan), aggregate(plan), second_order)
    assume(all(t is None or t.abs().amax() < 1e3 for t in exact.values() if t is None or t.numel()))
    net, lslr = learner(plan)
    lslr.rates.data = lslr.rates.data.float()
    found = outcome(
        BACKENDS[kind], net.float(), lslr, tasks(plan, torch.float32), aggregate(plan), second_order
    )
    assert {t.dtype for t in found.values() if t is not None} <= {torch.float32, torch.long}
    assert_near(
        {n: None if t is None else t.to(exact[n].dtype) for n, t in found.items()}, exact, 1e-2
    )


# Norms of few values one behind the other make anything of bfloat16's rounding.
@given(plans(most_steps=2, mixed=False), st.sampled_from(sorted(BACKENDS)), st.booleans())
def test_bfloat16_autocast(plan: Plan, kind: str, second_order: bool) -> None:
    net, lslr = learner(plan, torch.float32)
    args = (net, lslr, tasks(plan, torch.float32), aggregate(plan), second_order)
    exact = outcome(BACKENDS[kind], *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(BACKENDS[kind], *args)
    for name, value in found.items():
        if value is not None:
            assert value.isfinite().all(), name
            assert value.dtype in (torch.float32, torch.long), name
    for name in ("loss", "step losses"):
        assert_near({name: found[name]}, {name: exact[name]}, 0.1)


# ---------------------------------------------------------------------------------------------
# Statistics stay where they belong.


@given(plans(most_steps=4), st.sampled_from(sorted(BACKENDS)), st.booleans())
def test_statistics_do_not_leak_out_of_frozen_statistics(
    plan: Plan, kind: str, training: bool
) -> None:
    net, lslr = learner(plan)
    args = (tasks(plan), aggregate(plan), True)
    expected = outcome(BACKENDS[kind], net.train(), lslr, *args)
    before = copy.deepcopy(net.state_dict())
    net.train(training)
    with mpp.frozen_statistics(net):
        BACKENDS[kind](net, lslr, *args)
        found = outcome(BACKENDS[kind], net, lslr, *args)  # a copy is frozen too
    assert_near(net.state_dict(), before, 0.0)
    for name, value in net.named_buffers():
        torch.testing.assert_close(found.pop(name), value, rtol=0, atol=0)
    assert_near(found, {name: expected[name] for name in found}, 1e-9)


@given(plans(most_steps=4), st.sampled_from(sorted(BACKENDS)), st.booleans())
def test_tasks_do_not_see_each_other(plan: Plan, kind: str, training: bool) -> None:
    net, lslr = learner(plan)
    net.train(training)
    batch, order = tasks(plan), torch.randperm(plan.tasks)
    found = outcome(BACKENDS[kind], net, lslr, task_of(batch, order), sum_, True)
    expected = outcome(BACKENDS[kind], net, lslr, batch, sum_, True)
    expected["step losses"] = expected["step losses"][order]
    moments = [name for name, _ in net.named_buffers() if not name.endswith("tracked")]
    if training:  # a moving average does depend on the order
        found, expected = (
            {n: t for n, t in o.items() if n not in moments} for o in (found, expected)
        )
    assert_near(found, expected, 1e-7)


def sum_(losses: Tensor) -> Tensor:
    return losses.sum(-1)


@given(plans(), st.integers(0, 7))
def test_a_forward_moves_the_row_of_its_step_alone(plan: Plan, step: int) -> None:
    assume(step < plan.steps)
    net, _ = learner(plan)
    before = copy.deepcopy(dict(net.named_buffers()))
    with mpp.at_step(net, step):
        call(net, task_of(tasks(plan), 0)[0])
    others = [row for row in range(plan.steps) if row != step]
    for name, table in net.named_buffers():
        torch.testing.assert_close(table[others], before[name][others], rtol=0, atol=0)
        if name.endswith("tracked"):
            assert (table[step] > before[name][step]).all()


# ---------------------------------------------------------------------------------------------
# Round trips.


def by_state_dict(learner_: nn.Module, fresh: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(learner_.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


TRIPS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "state_dict": by_state_dict,
    "deepcopy": lambda learner_, fresh: copy.deepcopy(learner_),
    "pickle": lambda learner_, fresh: pickle.loads(pickle.dumps(learner_)),
}


@given(plans(most_steps=4), st.sampled_from(sorted(TRIPS)))
def test_round_trips(plan: Plan, trip: str) -> None:
    assume(not callable(ADAPT[plan.adapt]) or trip != "pickle")
    both = nn.ModuleDict(dict(zip(("net", "lslr"), learner(plan), strict=True)))
    args = (tasks(plan), aggregate(plan), True)
    run = BACKENDS["torchopt"]
    for p in both.parameters():
        p.data.add_(0.01)
    run(both["net"], both["lslr"], *args)  # it has statistics of its own
    again = TRIPS[trip](both, nn.ModuleDict(dict(zip(("net", "lslr"), learner(plan), strict=True))))
    assert_near(outcome(run, *again.values(), *args), outcome(run, *both.values(), *args), 0.0)
    before = copy.deepcopy(both.state_dict())
    for p in again.parameters():  # nothing is shared
        p.data.zero_()
    call(again["net"], task_of(tasks(plan), 0)[0])
    for name, tensor in both.state_dict().items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@given(st.integers(1, 8), st.integers(0, 20), st.integers(0, 30), st.integers(0, 30))
def test_schedules_travel(steps: int, anneal: int, first_order: int, epochs: int) -> None:
    msl, da = mpp.MultiStepLoss(steps, anneal), mpp.DerivativeOrderAnnealing(first_order)
    for _ in range(epochs):
        msl.step()
        da.step()
    for schedule in (msl, da):
        for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert again.state_dict() == schedule.state_dict()
    assert da.second_order == (epochs >= first_order)
    weights = msl.weights
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    assert weights.min() >= 0
    assert weights[-1] == weights.max()
    assert (weights.count_nonzero() == 1) == (steps == 1 or epochs >= anneal)


# ---------------------------------------------------------------------------------------------
# The closed form of batch norm.


@st.composite
def norm_inputs(draw: Any, largest: int = 4) -> tuple[list[Tensor], list[Tensor | None], float]:
    """x [T, N, C, ...], weight and bias [T, C] or None, and eps; T is for vmap."""
    channels, dims = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(1, largest), min_size=dims, max_size=dims))
    least = 2 if all(size == 1 for size in sizes) else 1
    count, several = draw(st.integers(least, largest)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    spread, shift = draw(st.sampled_from([0.1, 1.0, 10.0])), draw(st.sampled_from([0.0, 3.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(several, count, channels, *sizes) * spread + shift
    if draw(st.booleans()) and dims in CHANNELS_LAST:
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    affine = [normal(several, channels) if draw(st.booleans()) else None for _ in range(2)]
    return [x], affine, draw(st.sampled_from([1e-3, 1e-2, 0.3]))


def everything_of(function: Any, inputs: list[Tensor | None], eps: float) -> dict[str, Tensor]:
    """Output, statistics, gradients, and second derivatives by both ways that torch takes."""
    inputs = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
    given_ = [t for t in inputs if t is not None]
    output, *statistics = function(*inputs, eps)
    found = {"output": output, "mean": statistics[0], "var": statistics[1]}
    first = torch.autograd.grad((output**3 + output).sum(), given_, create_graph=True)
    total = sum((g.sin() * g).sum() for g in first)
    second = torch.autograd.grad(total, given_, retain_graph=True)
    differentiable = torch.autograd.grad(total, given_, create_graph=True)
    for order, part in enumerate((first, second, differentiable)):
        found |= {f"{order}, {i}": t for i, t in enumerate(part)}
    return {name: t.detach() for name, t in found.items()}


@given(norm_inputs())
def test_closed_form_equals_the_composition(case: Any) -> None:
    (x,), affine, eps = case
    for task in range(x.shape[0]):
        inputs = [x[task], *(None if t is None else t[task] for t in affine)]
        ours, theirs = (
            everything_of(function, inputs, eps)
            for function in (batch_normalize, batch_normalize_reference)
        )
        assert_near(ours, theirs, 1e-8)


@given(norm_inputs(), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_closed_form_under_vmap_equals_tasks_in_turn(case: Any, mapped: tuple[bool, ...]) -> None:
    (x,), affine, eps = case
    assume(any(mapped[i] for i, t in enumerate([x, *affine]) if t is not None))
    inputs = [
        t if t is None or each else t[0] for t, each in zip([x, *affine], mapped, strict=True)
    ]
    in_dims = tuple(
        0 if t is not None and each else None for t, each in zip(inputs, mapped, strict=True)
    )

    def vmapped(*inputs: Tensor | None) -> Any:
        *tensors, eps = inputs
        return vmap(lambda *t: batch_normalize(*t, eps), in_dims)(*tensors)

    def one_by_one(*inputs: Tensor | None) -> Any:
        *tensors, eps = inputs
        every = []
        for task in range(x.shape[0]):
            own = [t if d is None else t[task] for t, d in zip(tensors, in_dims, strict=True)]
            every.append(batch_normalize_reference(*own, eps))
        return [torch.stack(part) for part in zip(*every, strict=True)]

    ours, theirs = (everything_of(run, inputs, eps) for run in (vmapped, one_by_one))
    assert_near(ours, theirs, 1e-8)


@given(norm_inputs(largest=2), st.sampled_from(["gradcheck", "gradgradcheck"]))
def test_derivatives_are_those_of_finite_differences(case: Any, check: str) -> None:
    (x,), affine, _ = case
    inputs = [x[0] / x.std().clamp_min(1), *(t[0] for t in affine if t is not None)]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def output(x: Tensor, *given_: Tensor) -> Tensor:
        rest = iter(given_)
        return batch_normalize(x, *(None if t is None else next(rest) for t in affine), 0.3)[0]

    assert getattr(torch.autograd, check)(output, inputs)
