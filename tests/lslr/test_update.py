"""The inner update in closed form against its composition of torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap

import mamlpp_ext as mpp
from mamlpp_ext.lslr.update import descend, descend_reference

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward mode, when first used, compiles by what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

Update = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], tuple[Tensor, ...]]
SHAPES = [(3, 2), (), (4,), (2, 3, 2, 2)]
BOTH = (descend, descend_reference)


@pytest.fixture(autouse=True, params=["torch's own", "closed form"])
def derived_by(request: pytest.FixtureRequest, closed_forms: None) -> str:
    """Small updates are derived by torch; here every one by both in turn."""
    if request.param == "torch's own":
        request.getfixturevalue("by_size")
    return request.param


def test_the_two_are_two(derived_by: str) -> None:
    names = {t.grad_fn.name() for t in updated(descend, drawn())}
    own = {"_DescendBackward", "_DescendFunctionBackward"}
    assert bool(names & own) == (derived_by == "closed form"), names


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def drawn(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Parameters, as many gradients, and the rates."""
    tensors = [torch.randn(shape) for shape in [*shapes, *shapes, (len(shapes),)]]
    return [t.requires_grad_() for t in tensors]


def updated(update: Update, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    *tensors, rates = inputs
    return update(tensors[: len(rates)], tensors[len(rates) :], rates)


def derivatives(outputs: Sequence[Tensor], inputs: Sequence[Tensor], order: int) -> list[Any]:
    """All derivatives up to ``order`` of nonlinear functionals of the outputs."""
    found, scalar = [], sum(t.pow(3).sum() for t in outputs)
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True, materialize_grads=True)
        found += grads
        scalar = sum((0.1 * g).sin().sum() for g in grads)
    return found


def test_equals_the_composition_up_to_third_derivatives() -> None:
    inputs = drawn()
    close(*[updated(update, inputs) for update in BOTH], 0.0)
    close(*[derivatives(updated(update, inputs), inputs, 3) for update in BOTH], 1e-10)


def test_is_theta_less_rate_times_gradient() -> None:
    *tensors, rates = inputs = drawn()
    params, grads = tensors[:4], tensors[4:]
    expected = [p - rate * g for p, g, rate in zip(params, grads, rates, strict=True)]
    close(list(updated(descend, inputs)), expected)


def test_changes_nothing_in_place() -> None:
    inputs = drawn()
    before = [t.detach().clone() for t in inputs]
    derivatives(updated(descend, inputs), inputs, 1)
    close([t.detach() for t in inputs], before, 0.0)


def test_no_tensors() -> None:
    assert descend([], [], torch.ones(0)) == ()


@pytest.mark.parametrize("used", [[0], [1, 3], [2]])
def test_outputs_that_are_not_used(used: list[int]) -> None:
    inputs = drawn()
    found = []
    for update in BOTH:
        outputs = updated(update, inputs)
        found.append(derivatives([outputs[i] for i in used], inputs, 2))
    close(*found, 1e-10)
    unused = [i for i in range(len(SHAPES)) if i not in used]
    assert all(found[0][i].count_nonzero() == 0 for i in unused)


# Params, gradients, rates; at least one.
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, False)],
)
def test_inputs_that_do_not_require_grad(wanted: tuple[bool, ...]) -> None:
    inputs, kinds = drawn(), [0] * 4 + [1] * 4 + [2]
    for tensor, kind in zip(inputs, kinds, strict=True):
        tensor.requires_grad_(wanted[kind])
    chosen = [t for t in inputs if t.requires_grad]
    close(*[derivatives(updated(update, inputs), chosen, 2) for update in BOTH], 1e-10)


def test_some_gradients_are_constants() -> None:
    inputs = drawn()
    inputs[5].requires_grad_(False)  # of the second parameter
    chosen = [t for t in inputs if t.requires_grad]
    close(*[derivatives(updated(update, inputs), chosen, 2) for update in BOTH], 1e-10)


def test_without_gradients_there_is_no_graph() -> None:
    inputs = drawn()
    with torch.no_grad():
        assert not any(t.requires_grad for t in updated(descend, inputs))
    assert all(t.grad_fn is None for t in updated(descend, [t.detach() for t in inputs]))


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtypes", [[HALF] * 4, [torch.float16] * 4, [HALF, HALF, SINGLE, SINGLE]])
def test_half_precision_parameters_with_float32_rates(dtypes: list[torch.dtype]) -> None:
    # One of them 0-dim, which torch would turn into float32.
    inputs = [
        t.detach().to(dtype).requires_grad_()
        for t, dtype in zip(drawn(), [*dtypes, *dtypes, SINGLE], strict=True)
    ]
    tangents = [t.detach().cos() for t in inputs]
    found = []
    for update in BOTH:
        outputs = updated(update, inputs)
        grads = derivatives(outputs, inputs, 1)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, tangents)
            moved = [forward_ad.unpack_dual(t).tangent for t in updated(update, [*duals])]
        assert [t.dtype for t in outputs] == [t.dtype for t in moved] == dtypes
        assert [g.dtype for g in grads] == [t.dtype for t in inputs]
        found.append([*outputs, *grads, *moved])
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


def test_channels_last() -> None:
    shape = (2, 3, 4, 2)
    inputs = drawn([shape])
    with torch.no_grad():
        mixed = [t.contiguous(memory_format=torch.channels_last) for t in inputs[:2]]
    mixed = [*(t.requires_grad_() for t in mixed), inputs[2]]
    (output,) = updated(descend, mixed)
    assert output.is_contiguous(memory_format=torch.channels_last)
    one_of_each = [inputs[0], mixed[1], inputs[2]]
    for given in (mixed, one_of_each):
        outputs = updated(descend, given)
        ours = [*outputs, *derivatives(outputs, given, 2)]
        outputs = updated(descend_reference, inputs)
        close(ours, [*outputs, *derivatives(outputs, inputs, 2)], 1e-10)


def test_finite_differences() -> None:
    inputs = drawn([(2, 2), (), (3,)])

    def output(*inputs: Tensor) -> tuple[Tensor, ...]:
        return updated(descend, inputs)

    assert gradcheck(output, inputs, check_forward_ad=True, check_undefined_grad=True)
    assert gradgradcheck(output, inputs, check_fwd_over_rev=True)


# Which of the parameters, gradients and rates move.
@pytest.mark.parametrize("moving", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_dual_numbers(moving: tuple[int, int, int]) -> None:
    kinds = [0] * 4 + [1] * 4 + [2]
    inputs = drawn()
    tangents = [torch.randn_like(t) for t in inputs]
    found = []
    for update in BOTH:
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t, tangent) if moving[kind] else t
                for t, tangent, kind in zip(inputs, tangents, kinds, strict=True)
            ]
            outputs = updated(update, duals)
            moved = [*outputs, *derivatives(outputs, duals, 2)]
            moved = [forward_ad.unpack_dual(t).tangent for t in moved]
        # Nothing moves and 0 are the same.
        found.append([torch.zeros(()) if t is None else t for t in moved])
    for ours, theirs in zip(*found, strict=True):
        close(*torch.broadcast_tensors(ours, theirs), 1e-10)
    assert any(t.count_nonzero() for t in found[0][:4])


def test_inside_transforms() -> None:
    tasks = [[t.detach() for t in drawn()] for _ in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*tasks, strict=True)]

    def slopes(*inputs: Tensor) -> Any:
        def objective(*inputs: Tensor) -> Tensor:
            return sum(t.pow(3).sum() for t in updated(descend, inputs))  # type: ignore[return-value]

        return grad(objective, tuple(range(len(inputs))))(*inputs)

    one_by_one = []
    for task in tasks:
        inputs = [t.requires_grad_() for t in task]
        one_by_one.append(derivatives(updated(descend, inputs), inputs, 1))
        close(list(slopes(*task)), one_by_one[-1])
    expected = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
    close(list(vmap(slopes)(*stacked)), expected)


def composed_update(lslr: mpp.LSLR, params: Any, grads: Any, step: int) -> dict[str, Tensor]:
    """What ``LSLR.update`` is by its docstring."""
    rates = dict(zip(lslr.names, lslr.rates[:, step], strict=True))
    return {
        name: p if grads.get(name) is None else p - rates[name] * grads[name]
        for name, p in params.items()
    }


@pytest.mark.parametrize("absent", [(), (0,), (1, 3), (0, 1, 2)])
def test_gradients_of_none_leave_parameters_as_they_are(
    net: nn.Module, lslr: mpp.LSLR, absent: tuple[int, ...]
) -> None:
    params = dict(net.named_parameters())
    grads = {
        name: None if i in absent else torch.randn_like(params[name]).requires_grad_()
        for i, name in enumerate(lslr.names)
    }
    inputs = [*params.values(), *(g for g in grads.values() if g is not None), lslr.rates]
    found = []
    for after in (lslr.update(params, grads, 1), composed_update(lslr, params, grads, 1)):
        assert list(after) == list(params)
        found.append([*after.values(), *derivatives([*after.values()], inputs, 2)])
    close(*found, 1e-10)
    after = lslr.update(params, grads, 1)
    for i, name in enumerate(lslr.names):
        assert (after[name] is params[name]) == (i in absent)


def test_float32_gradients_of_half_precision_parameters() -> None:
    found = []
    for update in BOTH:
        params = [torch.linspace(-1, 1, 6).bfloat16().view(2, 3).requires_grad_()]
        rates = torch.full((1,), 0.5, requires_grad=True)
        grads = [torch.linspace(1, 2, 6, dtype=torch.float32).view(2, 3)]
        (update(params, grads, rates)[0].sin().sum()).backward()
        found.append((params[0].grad, rates.grad))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
