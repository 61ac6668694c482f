"""The inner step of a model: how loops drive it, and statistics that stay frozen."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")


def step_of(net: nn.Module) -> int:
    """Returns the row that a forward uses, seen from outside: the one whose count it moves."""
    twin = copy.deepcopy(net)
    twin(torch.randn(5, 3))
    moved = twin.norm.num_batches_tracked - net.norm.num_batches_tracked
    return moved.nonzero().item()


def test_counts_in_order_and_moves_the_rows(net: nn.Module) -> None:
    seen = [(step, step_of(net)) for step in mpp.inner_steps(net, 3)]
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_stays_at_the_last_step(net: nn.Module) -> None:
    for _ in mpp.inner_steps(net, 2):
        pass
    assert step_of(net) == 1  # the target forward below the loop is the final step's
    next(mpp.inner_steps(net, 3))
    assert step_of(net) == 1  # a new loop that is dropped again puts it back there


def test_a_loop_left_early_puts_the_step_back(net: nn.Module) -> None:
    for step in mpp.inner_steps(net, 3):
        if step == 2:
            break
    assert step_of(net) == 0
    with pytest.raises(ZeroDivisionError):
        sum(1 / (step - 1) for step in mpp.inner_steps(net, 3))
    assert step_of(net) == 0
    with mpp.at_step(net, 2):
        for _ in mpp.inner_steps(net, 2):
            break
        assert step_of(net) == 2


def test_nothing_moves_before_the_first_step(net: nn.Module) -> None:
    with mpp.at_step(net, 2):
        loop = mpp.inner_steps(net, 3)
        assert step_of(net) == 2
        assert next(loop) == step_of(net) == 0


def test_the_older_of_two_loops_is_refused(net: nn.Module) -> None:
    older, newer = mpp.inner_steps(net, 3), mpp.inner_steps(net, 3)
    assert [next(older), next(older), next(newer)] == [0, 1, 0]
    with pytest.raises(RuntimeError, match=r"inner step 2: another inner_steps loop.*use a copy"):
        next(older)
    assert list(newer) == [1, 2]  # and the newer one goes on
    assert step_of(net) == 2


def test_an_older_loop_that_is_only_closed_disturbs_nothing(net: nn.Module) -> None:
    older = mpp.inner_steps(net, 3)
    next(older)
    newer = mpp.inner_steps(net, 3)
    assert [next(newer), next(newer)] == [0, 1]
    older.close()
    assert next(newer) == step_of(net) == 2


def test_nested_loops_over_copies(net: nn.Module) -> None:
    twin = copy.deepcopy(net)
    seen = [(i, j) for i in mpp.inner_steps(net, 2) for j in mpp.inner_steps(twin, 2)]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_at_step_restores(net: nn.Module) -> None:
    for step in mpp.inner_steps(net, 2):
        with mpp.at_step(net, 2):
            assert step_of(net) == 2
            with mpp.at_step(net, 0):
                assert step_of(net) == 0
            assert step_of(net) == 2
        with pytest.raises(RuntimeError, match="cannot be multiplied"), mpp.at_step(net, 2):
            net(torch.ones(5, 7))
        assert step_of(net) == step


def test_a_loop_inside_at_step(net: nn.Module) -> None:
    with mpp.at_step(net, 1):
        assert list(mpp.inner_steps(net, 3)) == [0, 1, 2]
        assert step_of(net) == 2
    assert step_of(net) == 0


def test_more_steps_than_rows(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"layer 'norm'.*extra_steps='last'"):
        mpp.inner_steps(net, 4)  # at once, not at its first or fourth step
    net.norm.extra_steps = "last"
    assert [step_of(net) for _ in mpp.inner_steps(net, 5)] == [0, 1, 2, 2, 2]
    with mpp.at_step(net, 9):
        assert step_of(net) == 2


def test_model_without_per_step_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert list(mpp.inner_steps(model, 7)) == list(range(7))
    with mpp.at_step(model, 100):
        assert model(torch.randn(4, 3)).shape == (4, 2)


def test_layers_converted_apart_go_together(net: nn.Module) -> None:
    both = nn.ModuleList([net, copy.deepcopy(net)])
    for step in mpp.inner_steps(both, 3):
        assert [step_of(part) for part in both] == [step, step]


def with_plain_norm() -> nn.Module:
    layers = {"body": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "drop": nn.Dropout(0.5)}
    return nn.Sequential(OrderedDict(layers))


def with_per_step_norm() -> nn.Module:
    return mpp.convert_batchnorm(with_plain_norm(), 3)


def without_statistics() -> nn.Module:
    model = with_plain_norm()
    model.norm = nn.BatchNorm1d(4, track_running_stats=False)
    return model


BUILDS = [with_plain_norm, with_per_step_norm, without_statistics]


def trained(build: Callable[[], nn.Module], mode: bool) -> tuple[nn.Module, Tensor]:
    """A model with statistics of a distribution that is not its input's."""
    model = build()
    model(torch.randn(20, 3) + 3)
    return model.train(mode), torch.randn(50, 3)


def by_batch(model: nn.Module, x: Tensor) -> Tensor:
    """What batch statistics make of ``x``, written out."""
    x = model.body(x)
    x = (x - x.mean(0)) / (x.var(0, correction=0) + model.norm.eps).sqrt()
    return x * model.norm.weight.view(-1, 4)[0] + model.norm.bias.view(-1, 4)[0]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", BUILDS)
def test_frozen_statistics(build: Callable[[], nn.Module], mode: bool, unchanged: Any) -> None:
    model, x = trained(build, mode)
    with unchanged(model):
        with mpp.frozen_statistics(model):
            with mpp.frozen_statistics(model):
                output = model(x)
            model(x)  # the outer one still holds
    expected = by_batch(model, x)
    if mode:  # dropout keeps the mode of the model
        assert 0.3 < (output == 0).double().mean() < 0.7
        expected = torch.where(output == 0, 0, 2 * expected)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", BUILDS)
def test_frozen_statistics_end_with_an_exception(
    build: Callable[[], nn.Module], mode: bool, unchanged: Any
) -> None:
    model, x = trained(build, mode)
    with unchanged(model), pytest.raises(ZeroDivisionError), mpp.frozen_statistics(model):
        model(x) / (1 // 0)
    counted = model.norm.num_batches_tracked
    before = None if counted is None else counted.clone()
    model(x)
    if before is not None:  # thawed again
        assert (counted - before).sum() == int(mode)


@pytest.mark.parametrize(
    "build",
    [with_plain_norm, with_per_step_norm],
)
def test_mode_may_change_while_statistics_are_frozen(build: Callable[[], nn.Module]) -> None:
    model, x = trained(build, True)
    with mpp.frozen_statistics(model):
        output = model.eval()(x)
    torch.testing.assert_close(output, by_batch(model, x))
    assert not any(layer.training for layer in model.modules())  # eval() is not undone


def test_only_one_part_may_be_frozen() -> None:
    both = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with mpp.frozen_statistics(both[0]):
        both(torch.randn(5, 3))
    assert [layer.num_batches_tracked.item() for layer in both] == [0, 1]


def test_forwards_within_a_backward_are_right_inside_at_step() -> None:
    """Activation checkpointing calls the layers again; outside they refuse (test_errors)."""
    net = nn.Sequential(nn.Linear(3, 4), mpp.PerStepBatchNorm1d(4, 3), nn.Tanh())
    with torch.no_grad():
        net[1].weight.copy_(torch.arange(1.0, 4.0).unsqueeze(1).expand(3, 4))
    x = torch.randn(5, 3, requires_grad=True)
    with mpp.at_step(net, 1):
        outputs = net(x), checkpoint(net, x, use_reentrant=False)
        grads = [torch.autograd.grad(y.sin().sum(), x) for y in outputs]
    torch.testing.assert_close(*grads)


# Dynamo looks at every attribute of what it is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_traces_layers_and_update() -> None:
    """Whole, without breaks, where it is to make the kernels."""
    torch.compiler.reset()  # what others compiled counts towards its limit
    ours = mpp.convert_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 3)
    theirs, x, found = copy.deepcopy(ours), torch.randn(5, 3), []
    lslr = mpp.LSLR(ours, 3)
    for net, compiled in ((ours, False), (theirs, True)):
        run, update = net, lslr.update
        if compiled:
            run, update = (torch.compile(f, backend="eager", fullgraph=True) for f in (net, update))
        losses = [run(x).sin().sum() for _ in mpp.inner_steps(net, 3)]
        params = dict(net.named_parameters())
        grads = torch.autograd.grad(torch.stack(losses).sum(), [*params.values()])
        adapted = update(params, dict(zip(params, grads, strict=True)), 1)
        found.append((losses, adapted, net[1].running_mean, net[1].running_var))
    torch.testing.assert_close(*found)
