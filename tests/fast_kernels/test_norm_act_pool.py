"""Batch norm, activation and pooling as one are torch's one after the other, in every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import vmap

from mamlpp_ext.fast_kernels import Layers, Running, normalize_activate_pool
from mamlpp_ext.fast_kernels.norm_act_pool import activate_pool, normalize_activate_pool_reference

# What torch itself warns of when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
PLAIN = Layers(1e-5, 0.0, ((2, 2), (2, 2), (0, 0), (1, 1), False))
POOLINGS = (
    None,
    ((2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), (1, 1), False),  # windows overlap
    ((2, 3), (2, 1), (0, 0), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), (2, 2), False),
    ((2, 2), (2, 2), (0, 0), (1, 1), True),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Any], Layers]:
    """Input, weight and bias, and the settings."""
    layers = Layers(
        draw(st.sampled_from([1e-5, 0.1])),
        draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
        draw(st.sampled_from(POOLINGS)),
    )
    n, c = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sides = draw(st.integers(3, 7)), draw(st.integers(3, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(n, c, *sides, generator=generator, dtype=torch.float64)
    sign = draw(st.sampled_from([1.0, -1.0, "mixed", None]))
    weight: Any = torch.rand(c, generator=generator, dtype=torch.float64) + 0.5
    if sign == "mixed":
        weight[::2] *= -1
    elif sign is not None:
        weight *= sign
    bias = torch.randn(c, generator=generator, dtype=torch.float64)
    given_bias = draw(st.booleans())
    return [x, None if sign is None else weight, bias if given_bias else None], layers


def laid(x: Tensor) -> Tensor:
    return x.movedim(1, 3).contiguous().movedim(3, 1)


def ours(layers: Layers):
    return lambda x, weight, bias: normalize_activate_pool(laid(x), weight, bias, layers, None)[0]


def torchs(layers: Layers):
    return lambda x, weight, bias: normalize_activate_pool_reference(x, weight, bias, layers)


def three_derivatives(function, inputs: list[Any]) -> list[Tensor]:
    """The gradient of the gradient of the gradient, each weighted by powers of itself."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    learned = [t for t in leaves if t is not None]
    value = (function(*leaves) ** 3).sum()
    found: list[Tensor] = []
    for order in range(3):
        grads = torch.autograd.grad(value, learned, create_graph=order < 2, allow_unused=True)
        found += [torch.zeros(()) if g is None else g for g in grads]
        value = sum((g**2).sum() * (i + 1) for i, g in enumerate(grads) if g is not None)
    return found


@settings(deadline=None, max_examples=60)
@given(cases())
def test_values_statistics_and_derivatives(case) -> None:
    inputs, layers = case
    x = laid(inputs[0]).requires_grad_()
    y, mean, var = normalize_activate_pool(x, *inputs[1:], layers, None)
    torch.testing.assert_close(y, torchs(layers)(*inputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, inputs[0].mean((0, 2, 3)))
    torch.testing.assert_close(var, inputs[0].var((0, 2, 3)))
    assert [mean.requires_grad, var.requires_grad] == [False, False]
    expected = three_derivatives(torchs(layers), inputs)
    for a, b in zip(three_derivatives(ours(layers), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * (1 + float(b.detach().abs().max())))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_double_backward_is_the_closed_form(case) -> None:
    """Outside of a graph, where the third derivative above is not asked for."""
    inputs, layers = case

    def second(function) -> tuple[Any, ...]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        learned = [t for t in leaves if t is not None]
        grads = torch.autograd.grad((function(*leaves) ** 3).sum(), learned, create_graph=True)
        value = sum((g**2).sum() * (i + 1) for i, g in enumerate(grads))
        return torch.autograd.grad(value, learned, allow_unused=True)

    for a, b in zip(second(ours(layers)), second(torchs(layers)), strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * (1 + float(b.detach().abs().max())))


@settings(deadline=None, max_examples=10)
@given(cases())
def test_gradchecks(case) -> None:
    inputs, layers = case
    # Apart from each other by more than the differences taken, on either side of the activation.
    x = torch.linspace(-1, 2, inputs[0].numel(), dtype=torch.float64)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    leaves[0] = x[order].view_as(inputs[0]).requires_grad_()
    for check in (gradcheck, gradgradcheck):
        assert check(ours(layers), leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_when_not_all_tensors_require_a_gradient(wanted) -> None:
    def second(function) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
        leaves = [x, torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        learned = [t for t in leaves if t.requires_grad]
        y = function(*leaves) * (1 + learned[0].sum())
        grads = torch.autograd.grad((y**3).sum(), learned, create_graph=True)
        return [
            found
            for g in grads
            for found in torch.autograd.grad(
                (g**2).sum(), learned, retain_graph=True, allow_unused=True
            )
        ]

    for a, b in zip(second(ours(PLAIN)), second(torchs(PLAIN)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(momentum) -> None:
    x = torch.randn(3, 2, 5, 5)
    norm = torch.nn.BatchNorm2d(2, momentum=momentum)
    running = Running(torch.zeros(2), torch.ones(2), momentum)
    found = normalize_activate_pool(laid(x), None, None, PLAIN, running)[0]
    torch.testing.assert_close(found, activate_pool(norm(x), PLAIN))
    torch.testing.assert_close(running.mean, norm.running_mean)
    torch.testing.assert_close(running.var, norm.running_var)


def test_ties_nan_and_weights_of_zero_go_where_torchs_go() -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    x[0, :, :2] = torch.tensor([1.0, 1.0, 2.0, 2.0])
    x[1, :, 3, 3] = -3.0
    weight = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    inputs = [x, weight, torch.ones(3, dtype=torch.float64)]
    expected = three_derivatives(torchs(PLAIN), inputs)
    for a, b in zip(three_derivatives(ours(PLAIN), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)
    x[0, 0, 0, 0] = float("nan")
    torch.testing.assert_close(ours(PLAIN)(*inputs), torchs(PLAIN)(*inputs), equal_nan=True)


@pytest.mark.parametrize("mapped", [(0, None), (0, 0), (2, 1)])
def test_vmap(mapped) -> None:
    """The derivatives are taken outside, as task_batch_loss does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 5, 5, generator=generator, dtype=torch.float64)
    weight, bias = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) + 0.5
    if mapped[1] is None:
        weight, bias = weight[0], bias[0]
    x, weight = x.movedim(0, mapped[0]), weight.movedim(0, mapped[1] or 0)
    dims = (*mapped, None if mapped[1] is None else 0)
    expected = three_derivatives(vmap(torchs(PLAIN), dims), [x, weight, bias])
    mine = vmap(lambda *t: normalize_activate_pool(*t, PLAIN, None)[0], dims)
    for a, e in zip(three_derivatives(mine, [x, weight, bias]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8 * (1 + float(e.detach().abs().max())))


def test_backwards_under_vmap() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cotangents = torch.randn(5, 2, 3, 2, 2, dtype=torch.float64)

    def gradients(function) -> tuple[Tensor, ...]:
        y = function(x, weight, bias)
        return torch.autograd.grad(y, [x, weight, bias], cotangents, is_grads_batched=True)

    for a, b in zip(gradients(ours(PLAIN)), gradients(torchs(PLAIN)), strict=True):
        torch.testing.assert_close(a, b)


def test_second_backwards_under_vmap() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cotangents = torch.randn(5, 2, 3, 4, 4, dtype=torch.float64)

    def gradients(function) -> tuple[Any, ...]:
        y = function(x, weight, bias)
        (grad,) = torch.autograd.grad((y**3).sum(), [x], create_graph=True)
        return torch.autograd.grad(grad, [x, weight, bias], cotangents, is_grads_batched=True)

    for a, b in zip(gradients(ours(PLAIN)), gradients(torchs(PLAIN)), strict=True):
        torch.testing.assert_close(a, b)


@FORWARD_MODE
def test_forward_mode_through_a_graph_built_before() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def tangents(function) -> list[Any]:
        y = function(x, weight, bias)
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), y.detach())
            grads = torch.autograd.grad(y, [x, weight, bias], g)
            return [forward_ad.unpack_dual(dual).tangent for dual in grads]

    torch.testing.assert_close(tangents(ours(PLAIN)), tangents(torchs(PLAIN)))


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_may_come_first(pooling, slope) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x[0, :, :2, :2] = 0.5  # windows with several greatest values, of zeros and of no zeros
    x[0, :, 2:4, :2] = 0.0
    x[0, :, :2, 2:4] = -0.5

    def gradients(function) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        return [y, torch.autograd.grad((y**2).sum(), leaf)[0]]

    def in_torchs_order(t: Tensor) -> Tensor:
        t = t if slope is None else F.leaky_relu(t, slope)
        return t if pooling is None else F.max_pool2d(t, *pooling)

    layers = Layers(0.0, slope, pooling)
    for a, b in zip(
        gradients(lambda t: activate_pool(t, layers)), gradients(in_torchs_order), strict=True
    ):
        assert torch.equal(a, b)
