"""The convolution and all of its derivatives are torch's, in every order and transform."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import vmap

from mamlpp_ext.fast_kernels import Geometry, convolution, convolve, has_slow_weight_gradient

# What torch itself warns of when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
PLAIN = Geometry((1, 1), (1, 1), (1, 1), 1)


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def torchs(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
    return F.conv2d(x, w, b, *how)


def ours(x: Tensor, w: Tensor, b: Tensor | None, how: Geometry) -> Tensor:
    return convolve(x, w, b, how, second_order=True)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Geometry]:
    """Shapes of an input and a weight, and the geometry, all of them legal."""
    pick = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups, kernel = pick(1, 2), [pick(1, 3) for _ in range(2)]
    dilation = (pick(1, 2), pick(1, 2))
    how = Geometry((pick(1, 2), pick(1, 2)), (pick(0, 1), pick(0, 1)), dilation, groups)
    sides = [2 * k + pick(0, 2) for k in kernel]
    channels = pick(1, 2)
    return (pick(1, 3), channels * groups, *sides), (pick(1, 2) * groups, channels, *kernel), how


def three_derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    """The gradient of the gradient of the gradient, each weighted by powers of itself."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = (function(*leaves) ** 3).sum()
    found: list[Tensor] = []
    for _ in range(3):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found += grads
        value = sum((g**2).sum() for g in grads)
    return found


@pytest.fixture(params=["together", "apart"])
def weights_gradient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute it, whatever the size."""
    chosen = request.param == "apart"
    monkeypatch.setattr(convolution, "has_slow_weight_gradient", lambda x, w: chosen)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolutions(), biased=st.booleans(), second_order=st.booleans())
def test_values_shape_and_three_derivatives(weights_gradient, case, biased, second_order) -> None:
    x_shape, w_shape, how = case
    inputs = tensors(x_shape, w_shape, *([w_shape[:1]] if biased else []))

    def call(function):
        return lambda x, w, b=None: function(x, w, b, how)

    found = call(lambda *t: convolve(*t, second_order))(*inputs)
    assert how.shape_of_output(*inputs[:2]) == found.shape
    torch.testing.assert_close(found, call(torchs)(*inputs), rtol=1e-12, atol=1e-12)
    expected = three_derivatives(call(torchs), inputs)
    for a, b in zip(three_derivatives(call(ours), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=convolutions())
def test_gradchecks(weights_gradient, case) -> None:
    x_shape, w_shape, how = case
    leaves = [t.requires_grad_() for t in tensors(x_shape, w_shape, w_shape[:1])]
    assert "_Convolution" in type(ours(*leaves, how).grad_fn).__name__
    for check in (gradcheck, gradgradcheck):
        assert check(lambda *t: ours(*t, how), leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_when_not_all_tensors_require_a_gradient(wanted) -> None:
    def second(function) -> list[Tensor]:
        inputs = tensors((2, 2, 5, 5), (3, 2, 3, 3), (3,))
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        learned = [t for t in leaves if t.requires_grad]
        y = function(*leaves, PLAIN) * leaves[1].sum()
        grads = torch.autograd.grad((y**3).sum(), learned, create_graph=True)
        # What arrives at the gradients depends on each of them alone, too.
        return [
            found
            for g in grads
            for found in torch.autograd.grad(
                (g**2).sum(), learned, retain_graph=True, allow_unused=True
            )
        ]

    for a, b in zip(second(ours), second(torchs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("second_order", [False, True])
def test_vmap(mapped, second_order) -> None:
    """The derivatives are taken outside, as task_batch_loss does."""
    (x,) = tensors((3, 2, 2, 5, 5)) if mapped[0] is not None else tensors((2, 2, 5, 5))
    (w,) = tensors((3, 4, 2, 3, 3), seed=1) if mapped[1] is not None else tensors((4, 2, 3, 3))
    (b,) = tensors((3, 4), seed=2) if mapped[1] is not None else tensors((4,))
    x, w = x.movedim(0, mapped[0] or 0), w.movedim(0, mapped[1] or 0)
    dims = (*mapped, None if mapped[1] is None else 0)

    def call(function):
        return vmap(lambda x, w, b: function(x, w, b, PLAIN), dims)

    mine = call(lambda *t: convolve(*t, second_order))
    found = mine(x, w, b)
    torch.testing.assert_close(found, call(torchs)(x, w, b))
    expected = three_derivatives(call(torchs), [x, w, b])
    for a, e in zip(three_derivatives(mine, [x, w, b]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_vmap_within_vmap() -> None:
    x, w = tensors((2, 3, 2, 2, 5, 5), (2, 3, 4, 2, 3, 3))

    def call(function):
        return vmap(vmap(lambda x, w: function(x, w, None, PLAIN)))

    expected = three_derivatives(call(torchs), [x, w])
    for a, e in zip(three_derivatives(call(ours), [x, w]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_backwards_under_vmap() -> None:
    x, w = (t.requires_grad_() for t in tensors((2, 2, 5, 5), (3, 2, 3, 3)))
    (cotangents,) = tensors((4, 2, 3, 5, 5))

    def gradients(function) -> tuple[Tensor, ...]:
        y = function(x, w, None, PLAIN)
        return torch.autograd.grad(y, [x, w], cotangents, is_grads_batched=True)

    for a, b in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(a, b)


@FORWARD_MODE
def test_forward_mode_through_a_graph_built_before() -> None:
    x, w = (t.requires_grad_() for t in tensors((2, 2, 5, 5), (3, 2, 3, 3)))

    def tangents(function) -> list[Tensor]:
        y = function(x, w, None, PLAIN)
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), y.detach())
            grads = torch.autograd.grad(y, [x, w], g)
            return [forward_ad.unpack_dual(dual).tangent for dual in grads]

    torch.testing.assert_close(tangents(ours), tangents(torchs))


def test_many_channels_have_the_weights_gradient_by_itself() -> None:
    """The default layout in, for oneDNN, and the default layout out; float64 is torch's own."""
    x, w, v = (t.float() for t in tensors((2, 128, 5, 5), *[(128, 128, 3, 3)] * 2))
    w = w / 30  # neither tiny nor huge outputs
    assert has_slow_weight_gradient(x, w)
    assert not has_slow_weight_gradient(x, w[:, :32])
    assert not has_slow_weight_gradient(x, w[:32])
    assert not has_slow_weight_gradient(x.double(), w.double())

    def derivatives(function, *leaves: Tensor) -> list[Tensor]:
        x, w, v = (t.detach().requires_grad_() for t in leaves)
        y = function(x, w, None, PLAIN).tanh().sum()
        to_w, to_x = torch.autograd.grad(y, [w, x], create_graph=True)
        return [to_w, to_x, *torch.autograd.grad((to_w * v).sum() + to_x.square().sum(), [w, x])]

    found = derivatives(ours, x, w, v)
    expected = derivatives(torchs, x.double(), w.double(), v.double())
    for mine, exact in zip(found, expected, strict=True):
        assert (mine - exact).norm() < 1e-5 * exact.norm()
    assert found[0].is_contiguous()
    assert found[2].is_contiguous()


def test_first_order_leaves_graphs_to_torch() -> None:
    x, w = (t.requires_grad_() for t in tensors((1, 1, 4, 4), (2, 1, 3, 3)))
    y = convolve(x, w, None, PLAIN, second_order=False)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_channels_last(channels) -> None:
    x, w = torch.randn(2, channels, 6, 6), torch.randn(4, channels, 3, 3)
    y = convolve(x, w, None, PLAIN, second_order=True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("call", [((2, 3, 5, 5), (4, 2, 3, 3)), ((2, 2, 5, 5), (4, 2, 8, 8))])
def test_errors_are_torchs(call, second_order) -> None:
    x, w = tensors(*call)
    how = PLAIN._replace(padding=(0, 0))
    with pytest.raises(RuntimeError) as expected:
        torchs(x, w, None, how)
    with pytest.raises(RuntimeError) as found:
        convolve(x, w, None, how, second_order)
    assert str(found.value).split(".")[0] == str(expected.value).split(".")[0]
