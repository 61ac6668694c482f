"""What layers make of knowing that nobody will ask for a second derivative: nothing but speed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mamlpp_ext as mpp
from mamlpp_ext.fast_kernels import batch_norm, batch_norm_kernels
from mamlpp_ext.integrations import higher, torchopt

pytestmark = pytest.mark.usefixtures("float64")


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def torchs_own(net: nn.Module) -> bool:
    """Returns whether the layer takes torch's own forward, seen from outside: by its graph."""
    with mpp.frozen_statistics(net):
        output = net(torch.randn(5, 3))  # kept: the graph goes with it
    stack, names = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        names.add(type(node).__name__)
        stack += [following for following, _ in node.next_functions if following is not None]
    assert len(names & {"NativeBatchNormBackward0", "_BatchNormBackward"}) == 1
    return "NativeBatchNormBackward0" in names


KERNELS = {"torch's": "batch_norm", "function": "_torchs_forward", "large": "_cpu_forward"}


@contextmanager
def reaching(kernel: str) -> Iterator[None]:
    """Makes a hinted layer take one of the forwards, by what counts as large; asserts that so."""
    reached: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if kernel != "torch's":
            patch.setattr(batch_norm, "WORTH_A_FUNCTION", 0)
        if kernel == "large":
            patch.setattr(batch_norm_kernels, "_LARGE", 0)
        for name in KERNELS.values():
            module = torch if name == "batch_norm" else batch_norm_kernels
            patch.setattr(module, name, noting(name, getattr(module, name), reached))
        yield
    assert KERNELS[kernel] in reached


def noting(name: str, function: Callable[..., Any], reached: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        reached.append(name)
        return function(*args, **kwargs)

    return noted


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum-0": {"momentum": 0.0},
    "no-affine": {"affine": False},
    "no-statistics": {"track_running_stats": False},
    "eps": {"eps": 0.3},
}


def layer_with(settings: dict[str, Any]) -> nn.Module:
    layer = mpp.PerStepBatchNorm2d(4, 3, **settings)
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return layer


def run_layer(layer: nn.Module, x: Tensor, second_order: bool, frozen: bool) -> dict[str, Any]:
    """Outputs, gradients and tables after two loops of two steps."""
    layer, outputs = copy.deepcopy(layer), []
    x = x.clone().requires_grad_()
    for _ in range(2):
        for step in mpp.inner_steps(layer, 2, second_order=second_order):
            if frozen:
                with mpp.frozen_statistics(layer):
                    outputs.append(layer(x * (step + 1)))
            else:
                outputs.append(layer(x * (step + 1)))
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(sum(out.pow(3).sum() for out in outputs), inputs)
    return {"outputs": outputs, "grads": grads, **layer.state_dict()}


@pytest.mark.parametrize("frozen", [False, True], ids=["recording", "frozen"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_is_the_same(kernel: str, settings: dict[str, Any], frozen: bool) -> None:
    layer, x = layer_with(settings), torch.randn(3, 4, 2, 3) * 2 + 1
    plain = run_layer(layer, x, True, frozen)
    with reaching(kernel):
        hinted = run_layer(layer, x, False, frozen)
    close(hinted, plain)
    if "num_batches_tracked" in hinted:
        # The third row has seen nothing.
        assert hinted["num_batches_tracked"].tolist() == ([0, 0, 0] if frozen else [2, 2, 0])
        still = frozen or settings.get("momentum", 0.1) == 0
        for name in ("running_mean", "running_var"):
            moved = hinted[name] != layer.get_buffer(name)
            assert moved.any(dim=1).tolist() == [not still, not still, False]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}])
def test_half_precision_input(settings: dict[str, Any], weights: torch.dtype) -> None:
    layer = layer_with(settings | {"dtype": torch.float32})
    for p in layer.parameters():
        p.data = p.data.to(weights)
    x = torch.randn(3, 4, 2, 3).bfloat16()
    hinted, plain = (run_layer(layer, x, second_order, False) for second_order in (False, True))
    assert {output.dtype for output in hinted["outputs"]} == {torch.bfloat16}
    assert hinted["running_var"].dtype == torch.float32
    torch.testing.assert_close(hinted, plain, rtol=1e-2, atol=1e-2)
    other = nn.BatchNorm2d(4, affine=False, momentum=settings.get("momentum", 0.1))
    other.running_mean.copy_(layer.running_mean[0])
    other.running_var.copy_(layer.running_var[0])
    for _ in range(2):
        other(x.double())
    close(hinted["running_mean"][0].double(), other.running_mean, 1e-2)
    close(hinted["running_var"][0].double(), other.running_var, 1e-2)


def meta_gradient(
    net: nn.Module, lslr: mpp.LSLR, task: tuple[Tensor, ...], hint: bool | None, graph: bool
) -> tuple[Any, Any]:
    """Meta-gradients of the losses of all steps, taken at the end, and tables."""
    net, lslr = copy.deepcopy((net, lslr))
    x, y, x_target, y_target = task
    params, losses = dict(net.named_parameters()), []
    for step in mpp.inner_steps(net, 3, second_order=hint):
        loss = cross_entropy(functional_call(net, params, x), y)
        chosen = [params[name] for name in lslr.names]
        grads = torch.autograd.grad(loss, chosen, create_graph=graph)
        params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
        losses.append(cross_entropy(functional_call(net, params, x_target), y_target))
    sum(losses).backward()
    grads = {name: p.grad for name, p in [*net.named_parameters(), *lslr.named_parameters()]}
    assert all(grad is not None and grad.count_nonzero() for grad in grads.values())
    return grads, net.state_dict()


@pytest.mark.parametrize("graph", [False, True], ids=["first order", "second order all the same"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kernel", KERNELS)
def test_meta_gradients_are_the_same(
    kernel: str,
    net: nn.Module,
    lslr: mpp.LSLR,
    task: tuple[Tensor, ...],
    momentum: float | None,
    graph: bool,
) -> None:
    net.norm.momentum = momentum
    plain = meta_gradient(net, lslr, task, None, graph)
    with reaching(kernel):
        hinted = meta_gradient(net, lslr, task, False, graph)
    close(hinted, plain)
    assert hinted[1]["norm.num_batches_tracked"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("later", ["large", "reset"])
def test_later_updates_of_statistics_leave_earlier_graphs_alone(later: str) -> None:
    layer, x = layer_with({}), torch.randn(3, 4, 2, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    for _ in mpp.inner_steps(layer, 1, second_order=False):
        output = layer(x)
        if later == "reset":
            layer.reset_running_stats()
        else:
            with reaching("large"):
                layer(x)
    close(torch.autograd.grad(output.pow(3).sum(), x), (plain,))


def test_only_a_loop_that_says_so_is_hinted(net: nn.Module) -> None:
    for hint, expected in ((None, False), (True, False), (False, True)):
        loop = mpp.inner_steps(net, 2, second_order=hint)
        assert not torchs_own(net)  # not before it has begun
        assert [torchs_own(net) for _ in loop] == [expected] * 2
        assert not torchs_own(net)


def test_large_input_on_cpu_takes_the_function_all_the_same(net: nn.Module) -> None:
    threads, names = torch.get_num_threads(), []
    for extra in (0, 1):
        samples = (batch_norm.WORTH_A_FUNCTION * threads**2) // 4 + extra
        for _ in mpp.inner_steps(net, 1, second_order=False):
            names.append(type(net.norm(torch.zeros(samples, 4)).grad_fn).__name__)
    assert names == ["NativeBatchNormBackward0", "_BatchNormBackward"]


def test_the_hint_ends_with_its_loop(net: nn.Module) -> None:
    for _ in mpp.inner_steps(net, 3, second_order=False):
        break
    assert not torchs_own(net)
    with pytest.raises(ZeroDivisionError):
        sum(1 / step for step in mpp.inner_steps(net, 3, second_order=False))
    assert not torchs_own(net)
    older = mpp.inner_steps(net, 3, second_order=False)
    next(older)
    newer = mpp.inner_steps(net, 3)
    next(newer)  # takes the layers over, with its own order
    assert not torchs_own(net)
    older.close()
    newer.close()
    assert not torchs_own(net)


def test_a_block_at_a_step_keeps_the_loops_hint(net: nn.Module) -> None:
    for _ in mpp.inner_steps(net, 2, second_order=False):
        with mpp.at_step(net, 2):
            assert torchs_own(net)
        assert torchs_own(net)
    with mpp.at_step(net, 0):
        assert not torchs_own(net)


def by_higher(net: nn.Module, lslr: mpp.LSLR, **order: bool) -> AbstractContextManager[Any]:
    return higher.innerloop_ctx(net, lslr, **order)


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, **order: bool) -> AbstractContextManager[Any]:
    return torchopt.innerloop_ctx(net, lslr, **order)


@pytest.mark.parametrize("context", [by_higher, by_torchopt])
def test_the_adapters_say_so_for_the_loops_inside(
    net: nn.Module, lslr: mpp.LSLR, context: Callable[..., Any]
) -> None:
    for second_order in (True, False):
        with context(net, lslr, second_order=second_order) as inner:
            model = inner[0] if isinstance(inner, tuple) else net
            for _ in mpp.inner_steps(model, 2):
                assert torchs_own(model) is not second_order
            for _ in mpp.inner_steps(model, 2, second_order=not second_order):
                assert torchs_own(model) is second_order  # the loop's own word counts
            assert torchs_own(model) is not second_order  # the target forward below
        assert not torchs_own(net)
    with pytest.raises(ZeroDivisionError), context(net, lslr, second_order=False):
        raise ZeroDivisionError
    assert not torchs_own(net)


@pytest.mark.parametrize("track", [True, False])
def test_highers_test_mode_is_first_order(net: nn.Module, lslr: mpp.LSLR, track: bool) -> None:
    with higher.innerloop_ctx(net, lslr, track_higher_grads=track) as (fnet, _):
        assert torchs_own(fnet) is not track
