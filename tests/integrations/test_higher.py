"""The adapter for higher: both orders, statistics that come back, and higher's own manners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp

higher = pytest.importorskip("higher")

from mamlpp_ext.integrations.higher import DifferentiableLSLR, LSLROptimizer, innerloop_ctx

pytestmark = pytest.mark.usefixtures("float64")

Task = tuple[Tensor, ...]


def adapt(fnet: nn.Module, diffopt: Any, task: Task, steps: int = 3, **settings: Any) -> Tensor:
    """The inner loop as users of higher write it; returns the sum of the target losses."""
    losses = []
    for _ in mpp.inner_steps(fnet, steps):
        diffopt.step(F.cross_entropy(fnet(task[0]), task[1]), **settings)
        losses.append(F.cross_entropy(fnet(task[2]), task[3]))
    return sum(losses)


def gradients(net: nn.Module, lslr: mpp.LSLR) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in [*net.named_parameters(), *lslr.named_parameters()]}


def expected_gradients(net: nn.Module, lslr: mpp.LSLR, task: Task, **ctx: Any) -> dict[str, Any]:
    net, lslr = copy.deepcopy((net, lslr))
    with innerloop_ctx(net, lslr, **ctx) as (fnet, diffopt):
        adapt(fnet, diffopt, task).backward()
    return gradients(net, lslr)


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_meta_gradient_reaches_weights_rows_and_rates(
    net: nn.Module, lslr: mpp.LSLR, task: Task, second_order: bool
) -> None:
    found = expected_gradients(net, lslr, task, second_order=second_order)
    for name, grad in found.items():
        assert grad is not None, name
        assert grad.count_nonzero() > 0, name
    assert found["rates"].count_nonzero() == found["rates"].numel()


def test_orders_differ(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    second, first = (expected_gradients(net, lslr, task, second_order=o) for o in (True, False))
    assert not torch.allclose(second["body.weight"], first["body.weight"])


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_graph_of_the_inner_gradients(
    net: nn.Module, lslr: mpp.LSLR, task: Task, second_order: bool
) -> None:
    seen: list[bool] = []

    def look(grads: list[Tensor]) -> list[Tensor]:
        seen.extend(grad.requires_grad for grad in grads if grad is not None)
        return grads

    with innerloop_ctx(net, lslr, second_order=second_order) as (fnet, diffopt):
        adapt(fnet, diffopt, task, grad_callback=look)
    assert any(seen) == second_order
    assert len(seen) >= 3 * len(lslr.names)


def test_first_order_rate_gradient(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    """dL/d rate = -<dL/d weight after the update, inner gradient>, in one step."""
    grads: list[Tensor] = []

    def keep(found: list[Tensor]) -> list[Tensor]:
        grads.extend(found)
        return found

    with innerloop_ctx(net, lslr, second_order=False) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(task[0]), task[1]), grad_callback=keep)
        updated = [p for p in fnet.parameters() if p.requires_grad]
        loss = F.cross_entropy(fnet(task[2]), task[3])
        slopes = torch.autograd.grad(loss, updated, retain_graph=True)
        loss.backward()
    names = [name for name, _ in net.named_parameters()]
    slope, grad = dict(zip(names, slopes, strict=True)), dict(zip(names, grads, strict=True))
    by_hand = torch.stack([-(slope[name] * grad[name]).sum() for name in lslr.names])
    torch.testing.assert_close(lslr.rates.grad[:, 0], by_hand)
    assert lslr.rates.grad[:, 1:].count_nonzero() == 0


def test_first_order_weights_gradient(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    """The slope after the update reaches the initial weights unchanged in one step."""
    with innerloop_ctx(net, lslr, second_order=False) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(task[0]), task[1]))
        updated = dict(zip(dict(net.named_parameters()), fnet.parameters(), strict=True))
        loss = F.cross_entropy(fnet(task[2]), task[3])
        wanted = [updated[name] for name in lslr.names]
        slopes = torch.autograd.grad(loss, wanted, retain_graph=True)
        loss.backward()
    for name, slope in zip(lslr.names, slopes, strict=True):
        torch.testing.assert_close(net.get_parameter(name).grad, slope)


def test_highers_own_context_takes_the_optimizer(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any
) -> None:
    expected = expected_gradients(net, lslr, task)
    optimizer = LSLROptimizer(net, lslr)
    before = {name: b.clone() for name, b in net.named_buffers()}
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fnet, diffopt):
        assert isinstance(diffopt, DifferentiableLSLR)
        adapt(fnet, diffopt, task).backward()
    torch.testing.assert_close(gradients(net, lslr), expected)
    torch.testing.assert_close(dict(net.named_buffers()), before)  # as ever, higher loses them


def test_optimizer_without_a_patched_model(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    params = dict(net.named_parameters())
    diffopt = higher.get_diff_optim(LSLROptimizer(net, lslr), list(params.values()))
    with mpp.frozen_statistics(net):
        loss = F.cross_entropy(net(task[0]), task[1])
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
        stepped = diffopt.step(loss, params=params.values())
    updated = lslr.update(params, dict(zip(params, grads, strict=True)), 0)
    torch.testing.assert_close(dict(zip(params, stepped, strict=True)), updated)


def plain(net: nn.Module) -> nn.Module:
    net.norm = nn.BatchNorm1d(4)
    return net


def per_step(net: nn.Module) -> nn.Module:
    return net


def shared(net: nn.Module) -> nn.Module:
    net.body = nn.Sequential(net.body, net.norm)  # the norm stands in two places
    return net


def shared_plain(net: nn.Module) -> nn.Module:
    return shared(plain(net))


@pytest.mark.parametrize("build", [plain, per_step, shared, shared_plain])
def test_statistics_come_back(
    net: nn.Module, task: Task, build: Callable[[nn.Module], nn.Module]
) -> None:
    net = build(net)
    twin, lslr = copy.deepcopy(net), mpp.LSLR(net, 3, lr=0.0, adapt="head.*")
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        adapt(fnet, diffopt, task)
        assert net.norm.num_batches_tracked.sum() == 0  # when the context ends, not before
    for _ in mpp.inner_steps(twin, 3):  # at rate 0 the model is its own loop
        twin(task[0])
        twin(task[2])
    assert twin.norm.num_batches_tracked.sum() in (6, 12)
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_tasks_in_turn_add_up(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    for _ in range(2):
        with innerloop_ctx(net, lslr) as (fnet, diffopt):
            adapt(fnet, diffopt, task)
    assert net.norm.num_batches_tracked.tolist() == [4, 4, 4]


def test_the_step_is_put_back(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    with mpp.at_step(net, 1):
        with innerloop_ctx(net, lslr) as (fnet, diffopt):
            adapt(fnet, diffopt, task)
            assert net.norm.inner_step.index == 2  # shared with the patched model
        assert net.norm.inner_step.index == 1


@pytest.mark.parametrize("build", [per_step, plain])
def test_an_exception_leaves_the_model_alone(
    net: nn.Module, task: Task, unchanged: Any, build: Callable[[nn.Module], nn.Module]
) -> None:
    net = build(net)
    lslr = mpp.LSLR(net, 3)
    with unchanged(net), unchanged(lslr), pytest.raises(ZeroDivisionError):
        with innerloop_ctx(net, lslr) as (fnet, diffopt):
            adapt(fnet, diffopt, task) / (1 // 0)


def test_frozen_statistics(net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any) -> None:
    net.eval()
    with unchanged(net), mpp.frozen_statistics(net), innerloop_ctx(net, lslr) as (fnet, diffopt):
        frozen = adapt(fnet, diffopt, task)
    with innerloop_ctx(net.train(), lslr) as (fnet, diffopt):
        torch.testing.assert_close(frozen, adapt(fnet, diffopt, task))


def test_test_mode_writes_nothing_back(
    net: nn.Module, lslr: mpp.LSLR, task: Task, unchanged: Any
) -> None:
    with innerloop_ctx(copy.deepcopy(net), lslr) as (fnet, diffopt):
        expected = adapt(fnet, diffopt, task)
    with unchanged(net), innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
        loss = adapt(fnet, diffopt, task)
        for p in fnet.parameters():
            assert p.grad_fn is None or p.grad_fn.next_functions[0][0] is None
    torch.testing.assert_close(loss, expected)  # the patched model adapts all the same


@pytest.mark.parametrize("track_higher_grads", [True, False])
def test_the_model_keeps_its_weights(
    net: nn.Module, lslr: mpp.LSLR, task: Task, track_higher_grads: bool
) -> None:
    before = copy.deepcopy(dict(net.named_parameters()))
    with innerloop_ctx(net, lslr, track_higher_grads=track_higher_grads) as (fnet, diffopt):
        adapt(fnet, diffopt, task)
        moved = zip(before, before.values(), fnet.parameters(), strict=True)
        assert [n for n, old, new in moved if not torch.equal(old, new)] == list(lslr.names)
    torch.testing.assert_close(dict(net.named_parameters()), before, rtol=0, atol=0)


def test_grad_callback(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    twin, halved = copy.deepcopy((net, lslr))
    halved.rates.data /= 2
    with innerloop_ctx(twin, halved) as (fnet, diffopt):
        expected = adapt(fnet, diffopt, task)

    def halve(grads: list[Tensor]) -> list[Tensor]:
        assert len(grads) == len(list(net.parameters()))  # higher's order, gaps included
        return [None if grad is None else grad / 2 for grad in grads]

    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        loss = adapt(fnet, diffopt, task, grad_callback=halve)
    torch.testing.assert_close(loss, expected)


def test_grad_callback_as_it_is_written_for_higher(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        adapt(fnet, diffopt, task, grad_callback=lambda grads: [g.clamp(-1, 1) for g in grads])


def test_grad_callback_sees_the_gradients_of_its_step(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    """What clips by the total norm must not count second derivatives, nor free their graph."""
    seen: list[list[Tensor]] = []

    def look(grads: list[Tensor]) -> list[Tensor]:
        seen.append(list(grads))
        return grads

    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        for step in mpp.inner_steps(fnet, 3):
            loss = F.cross_entropy(fnet(task[0]), task[1])
            diffopt.step(loss, grad_callback=look, override={"second_order": [step == 0]})
        F.cross_entropy(fnet(task[2]), task[3]).backward()
    place = [name for name, _ in net.named_parameters()].index("norm.weight")
    for step, grads in enumerate(seen):
        others = [row for row in range(3) if row != step]
        assert grads[place][others].count_nonzero() == 0


def test_override_of_the_order(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    expected = expected_gradients(net, lslr, task, second_order=False)
    with innerloop_ctx(net, lslr, second_order=True) as (fnet, diffopt):
        adapt(fnet, diffopt, task, override={"second_order": [False]}).backward()
    torch.testing.assert_close(gradients(net, lslr), expected)


def test_override_to_second_order(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    answers = []
    for order, override in ((True, None), (False, {"second_order": [True]})):
        copied, rates = copy.deepcopy((net, lslr))
        with innerloop_ctx(copied, rates, second_order=order) as (fnet, diffopt):
            adapt(fnet, diffopt, task, override=override).backward()
        answers.append([p.grad for p in (*copied.parameters(), *rates.parameters())])
    torch.testing.assert_close(*answers)


def test_what_was_frozen_since_stays_in_test_mode(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    frozen = net.get_parameter(lslr.names[0]).requires_grad_(False)
    with innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
        adapt(fnet, diffopt, task)
        adapted = dict(zip(dict(net.named_parameters()), fnet.fast_params, strict=True))
    assert adapted[lslr.names[0]].equal(frozen)
    assert not adapted[lslr.names[1]].equal(net.get_parameter(lslr.names[1]))


def test_override_of_the_rate_is_refused(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        loss = F.cross_entropy(fnet(task[0]), task[1])
        with pytest.raises(ValueError, match="lr"):
            diffopt.step(loss, override={"lr": [0.5]})


def test_parameters_without_gradient_stay(net: nn.Module, task: Task) -> None:
    net.spare = nn.Identity()
    net.spare.weight = nn.Parameter(torch.ones(2))
    net.body.bias.requires_grad_(False)
    lslr = mpp.LSLR(net, 3)
    assert "spare.weight" in lslr.names
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        adapt(fnet, diffopt, task).backward()
        torch.testing.assert_close(fnet.spare.weight, net.spare.weight)
    assert lslr.rates.grad[lslr.names.index("spare.weight")].count_nonzero() == 0
    assert net.body.bias.grad is None


def test_layers_without_weights(net: nn.Module, task: Task) -> None:
    net.norm = mpp.PerStepBatchNorm1d(4, 3, affine=False, track_running_stats=False)
    found = expected_gradients(net, mpp.LSLR(net, 3), task)
    assert all(grad is not None for grad in found.values())


@pytest.mark.parametrize("closure", [True, False])
def test_the_optimizer_alone_updates_in_place(
    net: nn.Module, lslr: mpp.LSLR, task: Task, closure: bool
) -> None:
    twin, params = copy.deepcopy(net), dict(net.named_parameters())
    optimizer = LSLROptimizer(net, lslr)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(task[0]), task[1])
        loss.backward()
        return loss

    for step in range(3):
        named = dict(twin.named_parameters())
        loss = F.cross_entropy(twin(task[0]), task[1])
        grads = torch.autograd.grad(loss, list(named.values()))
        updated = lslr.update(named, dict(zip(named, grads, strict=True)), step)
        for name, p in named.items():
            p.data = updated[name].detach()
        if closure:
            torch.testing.assert_close(optimizer.step(evaluate), loss)
        else:
            evaluate()
            assert optimizer.step() is None
        torch.testing.assert_close(params, named)
    assert all(p.is_leaf for p in params.values())
    assert dict(net.named_parameters()) is not params
    assert [*map(id, net.parameters())] == [*map(id, params.values())]


def test_higher_goes_on_where_the_optimizer_is(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    optimizer = LSLROptimizer(net, lslr)
    F.cross_entropy(net(task[0]), task[1]).backward()
    optimizer.step()
    net.zero_grad()
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(task[0]), task[1]))
        F.cross_entropy(fnet(task[2]), task[3]).backward()
    assert lslr.rates.grad[:, 1].count_nonzero() == len(lslr.names)
    assert lslr.rates.grad[:, [0, 2]].count_nonzero() == 0


def test_annealing_switches_the_order_between_tasks(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    da, found = mpp.DerivativeOrderAnnealing(1), []
    for _ in range(2):
        twin, table = copy.deepcopy((net, lslr))
        with innerloop_ctx(twin, table, second_order=da.second_order) as (fnet, diffopt):
            adapt(fnet, diffopt, task).backward()
        found.append(gradients(twin, table))
        da.step()
    expected = [expected_gradients(net, lslr, task, second_order=o) for o in (False, True)]
    torch.testing.assert_close(found, expected)


def test_layers_called_by_themselves_are_adapted(
    net: nn.Module, lslr: mpp.LSLR, task: Task
) -> None:
    """Bare higher gives a layer the weights of the first such call, whatever came after it."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model.head(model.relu(model.norm(model.body(x))))

    expected = expected_gradients(net, lslr, task)
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        losses = []
        for _ in mpp.inner_steps(fnet, 3):
            diffopt.step(F.cross_entropy(forward(fnet, task[0]), task[1]))
            losses.append(F.cross_entropy(forward(fnet, task[2]), task[3]))
        sum(losses).backward()
    torch.testing.assert_close(gradients(net, lslr), expected)


def test_hooks_see_the_parameters_of_their_call(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(module.body.weight))
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(task[0]), task[1]))
        fnet(task[0])
        others = [torch.zeros_like(p) for p in fnet.parameters()]
        fnet(task[0], params=others)
    torch.testing.assert_close(seen[0], net.body.weight)
    assert not torch.equal(seen[1], seen[0])
    assert seen[2] is others[0]


def test_hooks_of_the_patched_model_end_with_it(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    calls: list[str] = []
    net.head.register_forward_hook(lambda *args: calls.append("model's"))
    with innerloop_ctx(net, lslr) as (fnet, _):
        fnet.head.register_forward_hook(lambda *args: calls.append("patched model's"))
        fnet(task[0])
    assert calls == ["model's", "patched model's"]
    net(task[0])
    assert calls == ["model's", "patched model's", "model's"]


def test_highers_own_context_calls_hooks(net: nn.Module, lslr: mpp.LSLR, task: Task) -> None:
    net.register_forward_hook(lambda module, args, output: 2 * output)
    expected = expected_gradients(net, lslr, task)
    optimizer = LSLROptimizer(net, lslr)
    with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fnet, diffopt):
        adapt(fnet, diffopt, task).backward()
    torch.testing.assert_close(gradients(net, lslr), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_what_is_not_adapted_is_refused(
    net: nn.Module, task: Task, reentrant: bool
) -> None:
    """The patched layer has lost its weights by the time of the backward."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    net = Checkpointed()
    with innerloop_ctx(net, mpp.LSLR(net, 3, adapt="head.*")) as (fnet, diffopt):
        with pytest.raises(RuntimeError, match=r"activation checkpointing.*rematerialize=True"):
            diffopt.step(F.cross_entropy(fnet(task[0]), task[1]))


def test_a_fixed_point_of_the_patched_model_may_be_in_the_loss(net: nn.Module, task: Task) -> None:
    """As a proximal term has it: the model's own weights beside the adapted ones."""
    lslr = mpp.LSLR(net, 3)
    own = [*net.parameters()]
    with innerloop_ctx(net, lslr) as (fnet, diffopt):
        for _ in mpp.inner_steps(fnet, 3):
            apart = sum(((a - b) ** 2).sum() for a, b in zip(fnet.parameters(), own, strict=True))
            diffopt.step(F.cross_entropy(fnet(task[0]), task[1]) + 0.1 * apart)
        F.cross_entropy(fnet(task[2]), task[3]).backward()
    assert all(grad is not None for grad in gradients(net, lslr).values())
