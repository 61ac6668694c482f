"""A batch of tasks at once: the same in every form, random per task, and no trace of a failure."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from conftest import nodes
from mamlpp_ext.task_batch import loop as task_loop
from mamlpp_ext.task_batch.loop import TaskLoop
from mamlpp_ext.task_batch.rematerialize import OutputMemory

pytestmark = pytest.mark.usefixtures("float64")

FORMS = {
    "rematerialised": {"rematerialize": True},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 3": {"chunk_size": 3},  # of 4 tasks: the last chunk is smaller
    "more than all": {"chunk_size": 9},
    "both": {"chunk_size": 2, "rematerialize": True},
}


def run(net: nn.Module, lslr: mpp.LSLR, batch: tuple[Tensor, ...], **settings: Any) -> Any:
    settings = {"num_steps": 3, **settings}
    return mpp.task_batch_loss(net, lslr, batch, F.cross_entropy, **settings)


def outcome(net: nn.Module, lslr: mpp.LSLR, batch: tuple[Tensor, ...], **settings: Any) -> Any:
    """Runs on copies; returns results, every gradient, and the statistics afterwards."""
    net, lslr = copy.deepcopy((net, lslr))
    result = run(net, lslr, batch, **settings)
    result.loss.backward()
    values = result._asdict()
    grads = {name: p.grad for name, p in [*net.named_parameters(), *lslr.named_parameters()]}
    return {k: v.detach() for k, v in values.items()}, grads, dict(net.named_buffers())


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, form: dict[str, Any], second_order: bool
) -> None:
    common = {"aggregate": mpp.MultiStepLoss(3, 10), "second_order": second_order}
    expected = outcome(net, lslr, tasks, **common)
    torch.testing.assert_close(outcome(net, lslr, tasks, **common, **form), expected)
    assert all(grad is not None for grad in expected[1].values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_tasks_in_turn(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, momentum: float | None
) -> None:
    net.norm.momentum = momentum
    twin = copy.deepcopy(net)
    run(net, lslr, tasks)
    for task in range(4):
        run(twin, lslr, tuple(part[task : task + 1] for part in tasks))
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))
    assert net.norm.num_batches_tracked.tolist() == [8, 8, 8]  # support and target of 4 tasks


def test_result(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    result = run(net, lslr, tasks)
    assert [tuple(t.shape) for t in (result.loss, result.step_losses, result.logits)] == [
        (),
        (4, 3),
        (4, 6, 2),
    ]
    assert result.loss.requires_grad
    assert not result.step_losses.requires_grad
    assert not result.logits.requires_grad
    torch.testing.assert_close(result.loss.detach(), result.step_losses[:, -1].mean())
    last = F.cross_entropy(result.logits.flatten(0, 1), tasks[3].flatten())
    torch.testing.assert_close(result.loss.detach(), last)  # tasks are of equal size


def test_outputs_of_any_shape() -> None:
    net = nn.Conv2d(1, 2, 3)
    x, y = torch.randn(2, 3, 1, 5, 5), torch.randn(2, 3, 2, 3, 3)
    batch = (x, y, x[:, :2], y[:, :2])
    result = mpp.task_batch_loss(net, mpp.LSLR(net, 1), batch, F.mse_loss, num_steps=1)
    assert result.logits.shape == (2, 2, 2, 3, 3)


def test_the_model_is_not_adapted(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, unchanged: Any
) -> None:
    with unchanged(lslr), unchanged(net), mpp.frozen_statistics(net):
        run(net, lslr, tasks, rematerialize=True)
        run(net, lslr, tasks)


@pytest.mark.parametrize("rematerialize", [True, False])
def test_autograd_grad(net: nn.Module, lslr: mpp.LSLR, tasks: Any, rematerialize: bool) -> None:
    _, expected, _ = outcome(net, lslr, tasks)
    wanted = dict([*net.named_parameters(), *lslr.named_parameters()])
    loss = run(net, lslr, tasks, rematerialize=rematerialize).loss
    grads = torch.autograd.grad(loss, list(wanted.values()))
    torch.testing.assert_close(dict(zip(wanted, grads, strict=True)), expected)
    assert all(p.grad is None for p in wanted.values())


@pytest.mark.parametrize(
    ("aggregate", "by_hand"),
    [
        (None, lambda losses: losses[:, -1]),
        (mpp.FinalStepLoss(), lambda losses: losses[:, -1]),
        (mpp.MultiStepLoss(3, 4), lambda losses: losses.mean(1)),
        (lambda losses: losses.amax(1), lambda losses: losses.amax(1)),
    ],
    ids=["none", "final", "multi-step", "any function"],
)
def test_aggregates(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, aggregate: Any, by_hand: Any
) -> None:
    result = run(net, lslr, tasks, aggregate=aggregate)
    torch.testing.assert_close(result.loss.detach(), by_hand(result.step_losses).mean())


@pytest.mark.parametrize("rematerialize", [True, False])
def test_early_steps_of_weight_zero(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, rematerialize: bool
) -> None:
    """Only the final target loss has a graph; its gradients are those of the weighted sum."""
    weights = torch.tensor([0.0, 0.0, 1.0])
    expected = outcome(net, lslr, tasks, aggregate=lambda losses: losses @ weights)
    found = outcome(net, lslr, tasks, rematerialize=rematerialize)
    torch.testing.assert_close(found, expected)


def test_evaluation_without_gradients(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    expected, _, buffers = outcome(net, lslr, tasks)
    with torch.no_grad():
        for rematerialize in (False, True):
            twin = copy.deepcopy(net)
            result = run(twin, lslr, tasks, rematerialize=rematerialize)
            assert not result.loss.requires_grad
            torch.testing.assert_close(result._asdict(), expected)  # it adapts all the same
            torch.testing.assert_close(dict(twin.named_buffers()), buffers)


@pytest.mark.parametrize("rematerialize", [True, False])
def test_eval_mode_reads_running_statistics(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, unchanged: Any, rematerialize: bool
) -> None:
    with unchanged(net.eval()):
        losses = run(net, lslr, tasks, rematerialize=rematerialize).step_losses
    for row in range(3):  # each step has a row of its own
        net.norm.running_mean[row] += 1
        moved = run(net, lslr, tasks, rematerialize=rematerialize).step_losses
        assert (moved != losses).any(0).tolist() == [step >= row for step in range(3)]
        net.norm.running_mean[row] -= 1


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_frozen_statistics(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, unchanged: Any, mode: bool
) -> None:
    expected, _, _ = outcome(net, lslr, tasks)
    with unchanged(net.train(mode)), mpp.frozen_statistics(net):
        found = run(net, lslr, tasks)
    torch.testing.assert_close(found.step_losses, expected["step_losses"])


def with_dropout(net: nn.Module) -> tuple[nn.Module, mpp.LSLR]:
    net.head = nn.Sequential(nn.Dropout(0.5), net.head)
    return net, mpp.LSLR(net, 3, lr=0.3)


def test_dropout_draws_anew_for_every_task(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    one_task = tuple(part[:1].expand_as(part) for part in tasks)
    same = run(net, lslr, one_task).step_losses
    torch.testing.assert_close(same, same[:1].expand_as(same))
    drawn = run(*with_dropout(net), one_task).step_losses
    assert len(drawn[:, 0].unique()) == 4


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_rematerialising_replays_the_draws(net: nn.Module, tasks: Any, second_order: bool) -> None:
    net, lslr = with_dropout(net)
    found = []
    for rematerialize in (False, True):
        torch.manual_seed(7)
        found.append(
            outcome(net, lslr, tasks, rematerialize=rematerialize, second_order=second_order)
        )
        found[-1] = (*found[-1], torch.rand(3))  # what is drawn later is the same too
    torch.testing.assert_close(found[1], found[0])


def test_rematerialising_replays_autocast(net: nn.Module, tasks: Any) -> None:
    net = net.float()
    lslr, tasks = mpp.LSLR(net, 3), tuple(t.float() if t.is_floating_point() else t for t in tasks)
    found = []
    for rematerialize in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run(net, lslr, tasks, rematerialize=rematerialize).loss
        found.append(torch.autograd.grad(loss, [net.body.weight, lslr.rates]))
    torch.testing.assert_close(found[1], found[0])


def test_rematerialising_keeps_no_graph_of_the_steps(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    sizes = {
        (form, steps): nodes(run(net, lslr, tasks, rematerialize=form, num_steps=steps).loss)
        for form in (False, True)
        for steps in (2, 3)
    }
    growth = {form: sizes[form, 3] - sizes[form, 2] for form in (False, True)}
    assert growth[True] <= 3  # a node for the step and what picks its outputs
    assert growth[False] > 20 * growth[True]


@pytest.mark.parametrize("aggregate", [None, mpp.FinalStepLoss(), mpp.MultiStepLoss(3, 0)])
def test_target_losses_of_weight_zero_have_no_graph(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, aggregate: Any
) -> None:
    every = nodes(run(net, lslr, tasks, aggregate=lambda losses: losses.sum(1)).loss)
    assert nodes(run(net, lslr, tasks, aggregate=aggregate).loss) < every - 20


def test_first_order_builds_no_second_derivative_graph(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    first, second = (nodes(run(net, lslr, tasks, second_order=o).loss) for o in (False, True))
    assert first < second / 3


@pytest.mark.parametrize("switch", ["mode", "frozen"])
def test_mode_must_stay_until_a_rematerialised_backward(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, switch: str
) -> None:
    loss = run(net, lslr, tasks, rematerialize=True).loss
    if switch == "mode":
        net.eval()
        with pytest.raises(RuntimeError, match=r"switched between train, eval.*backward first"):
            loss.backward()
        net.train()
    else:
        with mpp.frozen_statistics(net), pytest.raises(RuntimeError, match="frozen_statistics"):
            loss.backward()
    assert all(p.grad is None for p in net.parameters())
    run(net, lslr, tasks, rematerialize=True).loss.backward()  # nothing is stuck


def test_weights_must_stay_until_a_rematerialised_backward(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    loss = run(net, lslr, tasks, rematerialize=True).loss
    with torch.no_grad():
        net.norm.weight += 1  # a meta-step taken too early would give silently wrong gradients
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def counting(fail_at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss function that fails at one of its calls."""
    calls: Iterator[int] = iter(range(100))

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        if next(calls) == fail_at:
            raise ArithmeticError("no loss today")
        return F.cross_entropy(logits, labels)

    return loss_fn


@pytest.mark.parametrize("form", [{}, *FORMS.values()], ids=["plain", *FORMS])
@pytest.mark.parametrize("fail_at", [1, 5])  # in the trial, after it
def test_a_failing_loss_leaves_no_trace(
    net: nn.Module,
    lslr: mpp.LSLR,
    tasks: Any,
    unchanged: Any,
    form: dict[str, Any],
    fail_at: int,
) -> None:
    fails = counting(fail_at)
    with unchanged(net), unchanged(lslr), mpp.at_step(net, 1):
        with pytest.raises(ArithmeticError):
            mpp.task_batch_loss(net, lslr, tasks, fails, num_steps=3, **form)
    net(torch.randn(5, 3))
    assert net.norm.num_batches_tracked.tolist() == [1, 0, 0]  # forwards write again


def test_a_failing_aggregate_leaves_no_trace(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, unchanged: Any
) -> None:
    with unchanged(net), pytest.raises(ZeroDivisionError):
        run(net, lslr, tasks, aggregate=lambda losses: losses / (1 // 0))


def test_a_failing_backward_leaves_the_step_alone(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    # The first time a model is seen, vmap is tried on it.
    mpp.task_batch_loss(net, lslr, tasks, counting(99), num_steps=3, rematerialize=True)
    fails = counting(7)  # six calls in the forward; the second in rebuilding two steps
    loss = mpp.task_batch_loss(net, lslr, tasks, fails, num_steps=3, rematerialize=True).loss
    counts = net.norm.num_batches_tracked.clone()
    with pytest.raises(ArithmeticError):
        loss.backward()
    assert torch.equal(net.norm.num_batches_tracked, counts)
    assert net.norm.inner_step.index == 0


def test_rebuilding_a_step_does_not_count_its_forwards(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    loss = run(net, lslr, tasks, rematerialize=True).loss
    before = {name: b.clone() for name, b in net.named_buffers()}
    loss.backward()
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)


def test_a_model_without_batch_norm(tasks: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    lslr = mpp.LSLR(net, 3)
    expected = outcome(net, lslr, tasks)
    torch.testing.assert_close(outcome(net, lslr, tasks, rematerialize=True), expected)


def test_only_the_head_is_adapted(net: nn.Module, tasks: Any) -> None:
    lslr = mpp.LSLR(net, 3, adapt="head.*")
    for form in ({}, {"rematerialize": True}):
        _, grads, _ = outcome(net, lslr, tasks, **form)
        assert all(grad.count_nonzero() for grad in grads.values())  # the rest is still learned


def test_frozen_parameters_get_no_gradient(net: nn.Module, tasks: Any) -> None:
    net.body.requires_grad_(False)
    net.norm.weight.requires_grad_(False)
    lslr = mpp.LSLR(net, 3)
    for form in ({}, {"rematerialize": True}):
        _, grads, _ = outcome(net, lslr, tasks, **form)
        missing = [name for name, grad in grads.items() if grad is None]
        assert missing == ["body.weight", "body.bias", "norm.weight"]


def test_fixed_rates(net: nn.Module, tasks: Any) -> None:
    lslr = mpp.LSLR(net, 3, learnable=False)
    expected = outcome(net, lslr, tasks)
    assert expected[1]["rates"] is None
    assert expected[1]["body.weight"] is not None
    torch.testing.assert_close(outcome(net, lslr, tasks, rematerialize=True), expected)


@pytest.mark.parametrize(
    "rematerialize",
    [True, False],
)
def test_gradient_reaches_the_data(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, rematerialize: bool
) -> None:
    """Inputs may come from something learned, such as an encoder in front of the model."""
    moved = [tasks[0].clone().requires_grad_(), tasks[2].clone().requires_grad_()]
    grads = []
    for form in ({"rematerialize": rematerialize}, {"chunk_size": 1}):
        batch = (moved[0], tasks[1], moved[1], tasks[3])
        loss = run(net, lslr, batch, **form).loss
        grads.append(torch.autograd.grad(loss, moved, allow_unused=True))
    assert grads[0][0] is not None
    torch.testing.assert_close(*grads)


def test_more_steps_than_were_trained(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    net.norm.extra_steps = lslr.extra_steps = "last"
    before = run(copy.deepcopy(net), lslr, tasks).step_losses
    result = run(net, lslr, tasks, num_steps=5)
    assert result.step_losses.shape == (4, 5)
    torch.testing.assert_close(result.step_losses[:, :3], before)
    assert net.norm.num_batches_tracked.tolist() == [8, 8, 24]
    result.loss.backward()
    assert lslr.rates.grad.count_nonzero() == lslr.rates.numel()


def test_plain_batchnorms_meaning_is_kept_by_one_row(tasks: Any) -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net = mpp.convert_batchnorm(plain, 1, extra_steps="last")
    run(net, mpp.LSLR(net, 3), tasks)
    assert net[1].num_batches_tracked.tolist() == [24]


@pytest.mark.parametrize("aggregate", [None, mpp.FinalStepLoss(), mpp.MultiStepLoss(3, 0)])
def test_without_the_losses_that_do_not_count(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, aggregate: Any
) -> None:
    values, grads, buffers = outcome(net, lslr, tasks, aggregate=aggregate)
    fewer, same_grads, fewer_seen = outcome(
        net, lslr, tasks, aggregate=aggregate, all_step_losses=False
    )
    assert fewer["step_losses"][:, :2].isnan().all()
    for name in ("loss", "logits"):
        torch.testing.assert_close(fewer[name], values[name])
    torch.testing.assert_close(fewer["step_losses"][:, 2], values["step_losses"][:, 2])
    torch.testing.assert_close(same_grads, grads)
    assert buffers["norm.num_batches_tracked"].tolist() == [8, 8, 8]
    assert fewer_seen["norm.num_batches_tracked"].tolist() == [4, 4, 8]  # the last target's count


def test_losses_that_count_are_always_computed(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    common = {"aggregate": mpp.MultiStepLoss(3, 10)}
    expected = outcome(net, lslr, tasks, **common)
    torch.testing.assert_close(outcome(net, lslr, tasks, **common, all_step_losses=False), expected)


def test_chunks_leave_no_graph_but_the_sum(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    whole, parts = run(net, lslr, tasks).loss, run(net, lslr, tasks, chunk_size=1).loss
    # The function itself, and one accumulator for each of the model's 6 tensors and the rates.
    assert nodes(parts) == 1 + 6 + 1
    assert nodes(whole) > 100
    scaled = torch.autograd.grad(3 * parts + 1, list(net.parameters()))
    expected = torch.autograd.grad(3 * whole + 1, list(net.parameters()))
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("rematerialize", [True, False])
def test_a_chunk_does_not_hold_those_before(
    net: nn.Module,
    lslr: mpp.LSLR,
    tasks: Any,
    monkeypatch: pytest.MonkeyPatch,
    rematerialize: bool,
) -> None:
    """Neither losses nor steps: not up to Python's next collection of garbage, either."""
    before: list[Any] = []
    real_run, real_step = TaskLoop.run, task_loop.TaskStep

    def run_alone(self: TaskLoop, *args: Any) -> Any:
        assert not any(held() for held in before)
        outputs = real_run(self, *args)
        before.append(weakref.ref(outputs[0]))
        return outputs

    def remembered(*args: Any) -> Any:
        step = real_step(*args)
        before.append(weakref.ref(step))
        return step

    monkeypatch.setattr(TaskLoop, "run", run_alone)
    monkeypatch.setattr(task_loop, "TaskStep", remembered)
    gc.disable()
    try:
        run(net, lslr, tasks, chunk_size=1, rematerialize=rematerialize)
    finally:
        gc.enable()
    assert len(before) == 4 * (1 + 3)


def test_module_form(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    settings = {"num_steps": 3, "aggregate": mpp.MultiStepLoss(3, 10), "chunk_size": 3}
    expected = outcome(net, lslr, tasks, **settings, second_order=False)
    module = mpp.TaskBatchLoss(net, lslr, F.cross_entropy, **settings)
    result = module(*tasks, second_order=False)
    result.loss.backward()
    torch.testing.assert_close({k: v.detach() for k, v in result._asdict().items()}, expected[0])
    torch.testing.assert_close(lslr.rates.grad, expected[1]["rates"])
    assert set(module.state_dict()) >= {"model.norm.running_mean", "lslr.rates"}
    module.aggregate.step()
    assert module(*tasks).loss != result.loss


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(4),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm1d(4, affine=True),
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
    ],
)
def test_torchs_own_norms_are_right_for_many_tasks(norm: Callable[[], nn.Module]) -> None:
    """Inside ``vmap(grad(...))`` they would not be, when their weight is adapted."""
    net = nn.Sequential(nn.Linear(3, 4), norm(), nn.Flatten(), nn.Linear(16, 2))
    lslr, labels = mpp.LSLR(net, 3, lr=0.3), torch.tensor([[0, 1, 0, 1, 1]] * 4)
    batch = torch.randn(4, 5, 4, 3), labels, torch.randn(4, 5, 4, 3), labels
    grads = [
        torch.autograd.grad(run(net, lslr, batch, chunk_size=size).loss, list(net.parameters()))
        for size in (None, 1)
    ]
    torch.testing.assert_close(*grads)


# One chunk for all is the plain form, whose graph reaches everything.
CUT_OFF = {name: form for name, form in FORMS.items() if name != "more than all"}


@pytest.mark.parametrize("form", CUT_OFF.values(), ids=CUT_OFF)
def test_what_loss_fn_closes_over_gets_no_gradient(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, form: dict[str, Any]
) -> None:
    """Not even a share of it, and the gradients that there are stay right."""

    def gradients(temperature: Tensor, **settings: Any) -> tuple[Tensor | None, ...]:
        loss = mpp.task_batch_loss(
            net, lslr, tasks, lambda x, y: F.cross_entropy(x / temperature, y), **settings
        ).loss
        wanted = [temperature] if temperature.requires_grad else []
        return torch.autograd.grad(loss, [lslr.rates, *wanted], allow_unused=True)

    (expected,) = gradients(torch.tensor(2.0), num_steps=3)
    rates, closed_over = gradients(torch.tensor(2.0, requires_grad=True), num_steps=3, **form)
    torch.testing.assert_close(rates, expected)
    assert closed_over is None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_second_backward_is_the_same(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, form: dict[str, Any]
) -> None:
    loss = run(net, lslr, tasks, **form).loss
    learned = [*net.parameters(), *lslr.parameters()]
    once = torch.autograd.grad(loss, learned, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, learned), once)


def test_what_is_kept_of_a_step_has_its_layout_and_counts_its_changes_alone() -> None:
    shelf = OutputMemory(100)
    images = torch.randn(2, 3, 4, 5)
    tensors = [images, images.to(memory_format=torch.channels_last), torch.arange(3), images[0, 0]]
    kept = [shelf.put(tensor) for tensor in tensors]
    for tensor, copied in zip(tensors, kept, strict=True):
        assert torch.equal(copied, tensor)
        assert copied.stride() == tensor.stride()
    versions = [t._version for t in kept]
    kept[0].zero_()
    assert [t._version - v for t, v in zip(kept, versions, strict=True)] == [1, 0, 0, 0]
    assert torch.equal(kept[1], tensors[1])


@pytest.mark.parametrize("rows", [1, 3])
def test_norms_of_one_channel_adapted_by_the_inner_loop(rows: int) -> None:
    """Their weights lie apart in memory when they are one for each task."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(576, 2)
    )
    net = mpp.convert_batchnorm(net, rows, extra_steps="last")
    with torch.no_grad():
        net[2].weight.copy_(1.0 + torch.arange(rows).unsqueeze(1))
    lslr, labels = mpp.LSLR(net, 3, lr=0.3, adapt="*"), torch.tensor([[0, 1, 0, 1]] * 3)
    batch = torch.randn(3, 4, 1, 28, 28), labels, torch.randn(3, 4, 1, 28, 28), labels
    grads = [
        torch.autograd.grad(run(net, lslr, batch, chunk_size=size).loss, list(net.parameters()))
        for size in (None, 1)
    ]
    torch.testing.assert_close(*grads)


class MeanLoss(mpp.FinalStepLoss):
    def __call__(self, step_losses: Any) -> Tensor:
        return step_losses.mean(-1)


class PenalisedLoss(mpp.MultiStepLoss):
    def __call__(self, step_losses: Any) -> Tensor:
        return super().__call__(step_losses) + step_losses[..., 0]


@pytest.mark.parametrize("aggregate", [MeanLoss(), PenalisedLoss(3, 0)])
def test_subclasses_of_aggregates_may_use_every_step(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, aggregate: Any
) -> None:
    learned = [*net.parameters(), *lslr.parameters()]
    grads = [
        torch.autograd.grad(run(net, lslr, tasks, aggregate=function).loss, learned)
        for function in (aggregate, lambda losses: aggregate(losses))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("graph", [True, False])
def test_parameters_frozen_after_the_rates_were_made_stay_as_they_are(
    net: nn.Module, tasks: Any, form: dict[str, Any], graph: bool
) -> None:
    lslr = mpp.LSLR(net, 3)
    frozen = next(iter(net.parameters())).requires_grad_(False)
    without = mpp.LSLR(net, 3)
    assert len(without.names) == len(lslr.names) - 1
    with torch.set_grad_enabled(graph):
        ours, expected = (run(net, table, tasks, **form) for table in (lslr, without))
    torch.testing.assert_close(ours.step_losses, expected.step_losses)
    if graph:
        ours.loss.backward()
        assert frozen.grad is None
        assert lslr.rates.grad[1:].all()
        assert not lslr.rates.grad[0].any()


class Learned(nn.Module):
    """A loss with a temperature, and an aggregate with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(2.0))

    def forward(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return logits[:, -1] + self.value * logits[:, 0]
        return F.cross_entropy(logits / self.value, labels)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_modules_for_loss_and_aggregate_learn(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, form: dict[str, Any]
) -> None:
    found = []
    for settings in ({}, form):
        loss, aggregate = Learned(), Learned()
        meta = mpp.TaskBatchLoss(net, lslr, loss, num_steps=3, aggregate=aggregate, **settings)
        meta(*tasks).loss.backward()
        found.append([p.grad for p in (loss.value, aggregate.value)])
    assert all(grad is not None and grad for grad in found[0])
    torch.testing.assert_close(*found)


def test_loss_functions_that_read_the_model_see_its_initial_weights(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    decay = next(iter(net.parameters()))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + 0.1 * decay.square().sum()

    losses = [
        mpp.task_batch_loss(net, lslr, tasks, loss, num_steps=3, **form).step_losses
        for form in FORMS.values()
    ]
    for one in losses[1:]:
        torch.testing.assert_close(one, losses[0])


def test_gradients_taken_by_chunks_go_with_the_backward(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any
) -> None:
    loss = run(net, lslr, tasks, chunk_size=1).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


class LossOfTheModel(nn.Module):
    """Holds the model, and so has its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        size = sum(p.square().sum() for p in self.model.parameters())
        return logits[:, -1] * size if labels is None else F.cross_entropy(logits, labels) + size


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_of_what_is_held_twice_arrive_once(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, form: dict[str, Any]
) -> None:
    held = LossOfTheModel(net)
    inputs = tasks[0].requires_grad_()
    batch = (inputs, tasks[1], inputs, tasks[1])
    grads = [
        torch.autograd.grad(
            mpp.task_batch_loss(
                net, lslr, batch, held, num_steps=3, aggregate=held, **settings
            ).loss,
            [*net.parameters(), *lslr.parameters(), inputs],
        )
        for settings in ({}, form)
    ]
    torch.testing.assert_close(*grads)
