"""What fails inside an inner loop leaves no trace, and what must not happen says so."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
Task = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------
# A failure at every place of every inner loop. A tripwire counts the places as they are passed.


class Trip:
    """Notes where a loop passes, and raises at one place."""

    def __init__(self) -> None:
        self.arm(None)

    def arm(self, at: int | None, error: type[BaseException] = ArithmeticError) -> None:
        self.at, self.error, self.passed = at, error, []

    def __call__(self, place: str) -> None:
        self.passed.append(place)
        if len(self.passed) - 1 == self.at:
            raise self.error(place)


class _Through(torch.autograd.Function):
    """The identity, whose backward and double backward pass the tripwire."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, trip: Trip, place: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.trip, ctx.place = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.trip(ctx.place)
        return _Through.apply(g, ctx.trip, "double backward"), None, None


class Wired(nn.Module):
    """A layer that passes the tripwire in its forward and its backward."""

    def __init__(self, trip: Trip) -> None:
        super().__init__()
        self.trip = [trip]  # a list: higher patches attributes by their type

    def forward(self, x: Tensor) -> Tensor:
        self.trip[0]("forward")
        return _Through.apply(x, self.trip[0], "backward")


def wired(net: nn.Module, lslr: mpp.LSLR, trip: Trip) -> tuple[nn.Module, mpp.LSLR]:
    """Copies with tripwires before and after the norm, and in the update."""
    net, lslr = copy.deepcopy((net, lslr))
    net.body = nn.Sequential(net.body, Wired(trip))
    net.relu = nn.Sequential(net.relu, Wired(trip))
    table = mpp.LSLR(net, STEPS)
    table.rates.data.copy_(lslr.rates)
    update = table.update

    def tripping_update(*args: Any) -> dict[str, Tensor]:
        trip("update")
        return update(*args)

    table.update = tripping_update
    return net, table


def cross_entropy(trip: Trip) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        trip("loss")
        return F.cross_entropy(logits, labels)

    return loss_fn


def loop(net: nn.Module, step: Callable[[Tensor], Any], task: Task, loss_fn: Any) -> Tensor:
    losses = []
    for _ in mpp.inner_steps(net, STEPS):
        step(loss_fn(net(task[0]), task[1]))
        losses.append(loss_fn(net(task[2]), task[3]))
    return sum(losses)


def by_higher(net: nn.Module, lslr: mpp.LSLR, task: Task, loss_fn: Any, order: bool) -> Tensor:
    with mpp_higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
        loss = loop(fnet, diffopt.step, task, loss_fn)
        loss.backward()
    return loss


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, task: Task, loss_fn: Any, order: bool) -> Tensor:
    with mpp_torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
        loss = loop(net, inner_opt.step, task, loss_fn)
        loss.backward()
    return loss


def by_task_batch(**form: Any) -> Callable[..., Tensor]:
    def run(net: nn.Module, lslr: mpp.LSLR, task: Task, loss_fn: Any, order: bool) -> Tensor:
        batch = tuple(torch.stack([part] * 2) for part in task)
        every = {"aggregate": lambda losses: losses.sum(1), "num_steps": STEPS, **form}
        return mpp.task_batch_loss(net, lslr, batch, loss_fn, second_order=order, **every).loss

    return run


def by_hand(net: nn.Module, lslr: mpp.LSLR, task: Task, loss_fn: Any, order: bool) -> Tensor:
    """A plain loop with ``update``: inner_steps drives one half of it, at_step the other."""
    params, losses = dict(net.named_parameters()), []

    def forward_and_update(step: int, params: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = loss_fn(torch.func.functional_call(net, params, (task[0],)), task[1])
        wanted = [params[name] for name in lslr.names]
        grads = torch.autograd.grad(loss, wanted, create_graph=order)
        params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
        losses.append(loss_fn(torch.func.functional_call(net, params, (task[2],)), task[3]))
        return params

    for step in mpp.inner_steps(net, 2):
        params = forward_and_update(step, params)
    with mpp.at_step(net, 2):
        forward_and_update(2, params)
        sum(losses).backward()
    return sum(losses)


def frozen_by_hand(net: nn.Module, *args: Any) -> Tensor:
    with mpp.frozen_statistics(net):
        return by_hand(net, *args)


LOOPS = {
    "higher": by_higher,
    "torchopt": by_torchopt,
    "task_batch": by_task_batch(),
    "task_batch rematerialised": by_task_batch(rematerialize=True),
    "task_batch in chunks": by_task_batch(chunk_size=1),
    "by hand": frozen_by_hand,
}


def differentiated(kind: str, net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> Tensor:
    loss = LOOPS[kind](net, lslr, task, F.cross_entropy, order)
    if kind.startswith("task_batch"):  # the others do it inside their context
        loss.backward()
    return loss


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("kind", LOOPS)
def test_a_failure_anywhere_leaves_no_trace(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any, kind: str, second_order: bool
) -> None:
    trip = Trip()
    model, rates = wired(net, lslr, trip)

    def run(model: nn.Module, rates: mpp.LSLR) -> Tensor:
        return LOOPS[kind](model, rates, task, cross_entropy(trip), second_order)

    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # a batch of tasks tries vmap first, the first time
        trip.arm(None)
        expected = run(model, rates)
        model.load_state_dict(before)
        for p in [*model.parameters(), *rates.parameters()]:
            p.grad = None
    places = trip.passed
    assert {"forward", "loss", "backward", "update"} <= set(places)
    assert places.count("forward") >= 4 * STEPS  # two wires, support and target
    for at, place in enumerate(places):
        trip.arm(at, (ArithmeticError, KeyboardInterrupt)[at % 2])
        with mpp.at_step(model, 1), unchanged(model), unchanged(rates):
            with pytest.raises(trip.error, match=place):
                run(model, rates)
            for p in [*model.parameters(), *rates.parameters()]:
                p.grad = None  # an outer backward cut short has filled some, as ever in torch
    trip.arm(None)
    torch.testing.assert_close(run(model, rates), expected)  # as if nothing had been


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_failure_while_vmap_is_tried(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any, error: Any, second_order: bool
) -> None:
    """It is raised, or in words if it may be vmap's; what it was tried on is as before."""
    trip = Trip()

    def run(model: nn.Module, rates: mpp.LSLR) -> Tensor:
        return LOOPS["task_batch"](model, rates, task, cross_entropy(trip), second_order)

    model, rates = wired(net, lslr, trip)
    expected = run(model, rates)
    count = len(trip.passed)
    trip.arm(None)
    run(model, rates)
    assert count > len(trip.passed)
    for at in range(count - len(trip.passed)):
        model, rates = wired(net, lslr, trip)
        trip.arm(at, error)
        with unchanged(model), unchanged(rates), pytest.raises((error, RuntimeError)) as info:
            run(model, rates)
        assert isinstance(info.value, error) or isinstance(info.value.__cause__, error)
        trip.arm(None)
        torch.testing.assert_close(run(model, rates), expected)


def test_a_plain_loop_counts_the_forwards_that_happened(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any
) -> None:
    """As with nn.BatchNorm: without a context around the task nobody knows what to take back."""
    trip = Trip()
    model, rates = wired(net, lslr, trip)
    weights = nn.ParameterList(model.parameters())
    by_hand(*wired(net, lslr, trip), task, cross_entropy(trip), True)
    trip.arm([at for at, place in enumerate(trip.passed) if place == "loss"][2])
    with unchanged(weights), unchanged(rates), pytest.raises(ArithmeticError):
        by_hand(model, rates, task, cross_entropy(trip), True)
    assert model.norm.num_batches_tracked.tolist() == [2, 1, 0]  # as far as it went
    assert model.norm.inner_step.index == 0


# ---------------------------------------------------------------------------------------------
# Contexts that overlap, and loops that are left.


CONTEXTS = {"higher": mpp_higher.innerloop_ctx, "torchopt": mpp_torchopt.innerloop_ctx}


@pytest.mark.parametrize("inner", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("outer", CONTEXTS.values(), ids=CONTEXTS)
def test_a_second_context_on_a_model_is_refused(
    net: nn.Module, lslr: mpp.LSLR, unchanged: Any, outer: Any, inner: Any
) -> None:
    with unchanged(net), unchanged(lslr), outer(net, lslr):
        with pytest.raises(RuntimeError, match=r"Sequential is inside.*leave one.*copy.deepcopy"):
            with inner(net, lslr):
                pass
        with pytest.raises(RuntimeError, match="inside an innerloop_ctx already"):
            with inner(net, lslr):  # the refusal did not let go of it
                pass
    with inner(net, lslr):  # but the end of the outer context did
        pass


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts_that_do_not_share_a_model(
    net: nn.Module, lslr: mpp.LSLR, task: Task, context: Any
) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(context(*copy.deepcopy((net, lslr))))
    for _ in range(3):
        with context(net, lslr):
            pass
    with pytest.raises(ZeroDivisionError), context(net, lslr):
        1 / 0  # noqa: B018
    with context(net, lslr):  # an exception lets go of the model too
        copy.deepcopy(net)
    with context(copy.deepcopy(net), lslr):
        pass


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_cannot_be_used_twice(
    net: nn.Module, lslr: mpp.LSLR, unchanged: Any, context: Any
) -> None:
    with unchanged(net):
        entered = context(net, lslr)
        with entered:
            with pytest.raises((RuntimeError, AttributeError)):  # Python's own refusal
                entered.__enter__()
        with pytest.raises((RuntimeError, AttributeError)):
            entered.__enter__()


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_a_loop_that_is_left_puts_the_step_back(
    net: nn.Module, lslr: mpp.LSLR, task: Task, stop_at: int
) -> None:
    with mpp.at_step(net, 1):
        for step in mpp.inner_steps(net, STEPS):
            if step == stop_at:
                break
        assert net.norm.inner_step.index == 1
        loop = mpp.inner_steps(net, STEPS)
        for _ in range(stop_at + 1):
            next(loop)
        assert net.norm.inner_step.index == stop_at
        del loop  # dropped, not even closed
        assert net.norm.inner_step.index == 1
        for context in CONTEXTS.values():
            with context(net, lslr) as inside:
                model = inside[0] if isinstance(inside, tuple) else net
                for step in mpp.inner_steps(model, STEPS):
                    if step == stop_at:
                        break
                assert net.norm.inner_step.index == 1
    assert net.norm.inner_step.loop is None


# ---------------------------------------------------------------------------------------------
# Copies made inside frozen_statistics.


def plain_norm(net: nn.Module) -> nn.Module:
    net.norm = nn.BatchNorm1d(4)
    return net


@pytest.mark.parametrize("build", [plain_norm, lambda net: net], ids=["plain", "per-step"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_copy_made_inside_is_frozen_until_the_context_ends(
    net: nn.Module, task: Task, unchanged: Any, build: Any, mode: bool
) -> None:
    net = build(net).train(mode)
    expected = copy.deepcopy(net)(task[0])
    with mpp.frozen_statistics(net):
        twin = copy.deepcopy(net)
        with unchanged(twin), unchanged(net):
            torch.testing.assert_close(twin(task[0]), net(task[0]))
        with mpp.frozen_statistics(net):
            inmost = copy.deepcopy(net)
        with unchanged(inmost):
            inmost(task[0])  # the outer context still holds
    with mpp.frozen_statistics(net):  # that of the original no longer holds for its copies
        for model in (twin, inmost):
            torch.testing.assert_close(model(task[0]), expected)
            assert model.norm.num_batches_tracked.sum() == int(mode)
    net(task[0])
    assert net.norm.num_batches_tracked.sum() == int(mode)


def test_a_copy_can_be_frozen_by_a_context_of_its_own(net: nn.Module, task: Task) -> None:
    for build in (lambda net: net, plain_norm):
        model = build(copy.deepcopy(net))
        with mpp.frozen_statistics(model):
            twin = copy.deepcopy(model)
        with mpp.frozen_statistics(twin):
            twin(task[0])
            model(task[0])
        assert model.norm.num_batches_tracked.sum() == 1
        assert twin.norm.num_batches_tracked.sum() == 0
        assert type(twin.norm) is type(model.norm)
        twin(task[0])
        assert twin.norm.num_batches_tracked.sum() == 1


# ---------------------------------------------------------------------------------------------
# Losses that are not finite.


BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", LOOPS)
def test_a_loss_that_is_not_finite_surfaces(
    net: nn.Module, lslr: mpp.LSLR, task: Task, kind: str, bad: float, second_order: bool
) -> None:
    """What a bad example makes of the loss and the gradients is NaN, not zero and not an error."""
    for part in (0, 2):  # in the support set and in the target set
        spoilt = [tensor.clone() for tensor in task]
        spoilt[part][0, 0] = bad
        model, rates = copy.deepcopy((net, lslr))
        assert differentiated(kind, model, rates, spoilt, second_order).isnan()
        for name, p in [*model.named_parameters(), *rates.named_parameters()]:
            assert not p.grad.isfinite().all(), name


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_not_finite_goes_through_the_layer_as_through_torchs(bad: float) -> None:
    layer, plain = mpp.PerStepBatchNorm1d(3, 2), nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    x[0, 0] = bad
    given = [x.clone().requires_grad_() for _ in range(2)]
    outputs = layer(given[0]), plain(given[1])
    for output in outputs:
        output.pow(2).sum().backward()
    torch.testing.assert_close(*outputs, equal_nan=True)
    torch.testing.assert_close(given[0].grad, given[1].grad, equal_nan=True)
    for name in ("running_mean", "running_var"):
        finite = [layer.get_buffer(name)[0].isfinite(), plain.get_buffer(name).isfinite()]
        assert [part.tolist() for part in finite] == [[False, True, True]] * 2
        assert layer.get_buffer(name)[1].isfinite().all()  # the row of another step


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_step_that_counts_is_not_hidden_by_the_aggregate(bad: float) -> None:
    for place in range(STEPS):
        losses = torch.ones(STEPS)
        losses[place] = bad
        for msl in (mpp.MultiStepLoss(STEPS, 4), mpp.MultiStepLoss(STEPS, 0), mpp.FinalStepLoss()):
            counts = place == STEPS - 1 or getattr(msl, "anneal_epochs", 0) > 0
            for given in (losses, list(losses)):
                torch.testing.assert_close(
                    msl(given), torch.tensor(bad if counts else 1.0), equal_nan=True
                )


# ---------------------------------------------------------------------------------------------
# Threads.


def learn(net: nn.Module, lslr: mpp.LSLR, tasks: Task, together: Callable[[], Any]) -> Any:
    """Every kind of inner loop on every task; returns gradients and statistics."""
    for kind in LOOPS:
        for task in zip(*tasks, strict=True):
            together()
            differentiated(kind, net, lslr, task, "torchopt" in kind)
            if kind == "higher":
                with mpp.frozen_statistics(net):
                    net(task[0])
    grads = {name: p.grad for name, p in [*net.named_parameters(), *lslr.named_parameters()]}
    return grads, dict(net.named_buffers())


def test_threads_with_a_model_each_do_not_disturb_each_other(
    net: nn.Module, lslr: mpp.LSLR, tasks: Task
) -> None:
    data = [(tasks[0] + shift, *tasks[1:]) for shift in (0.0, 0.3, 0.6)]
    expected = [learn(*copy.deepcopy((net, lslr)), part, lambda: None) for part in data]
    found: dict[int, Any] = {}
    barrier = threading.Barrier(len(data), timeout=60)

    def work(i: int) -> None:
        torch.set_default_dtype(torch.float64)
        found[i] = learn(*copies[i], data[i], barrier.wait)

    copies = [copy.deepcopy((net, lslr)) for _ in data]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(data))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # they take turns all the time
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    torch.testing.assert_close([found[i] for i in range(len(data))], expected)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_two_threads_on_one_model_are_refused(net: nn.Module, lslr: mpp.LSLR, context: Any) -> None:
    """A model has one current step and one set of statistics: a copy for each thread."""
    refusals: list[str] = []

    def enter() -> None:
        try:
            with context(net, lslr):
                pass
        except RuntimeError as error:
            refusals.append(str(error))

    with context(net, lslr):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refusals) == 1
    assert "copy.deepcopy of the model" in refusals[0]
