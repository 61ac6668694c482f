"""fast_kernels computes what torch computes, in values and in derivatives of every order."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_ext as mpp
from mamlpp_ext import convolution, kernels, max_pool
from mamlpp_ext.fast_kernels.kernels import FastKernels

# What torch itself warns of when forward mode is first used.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.fixture(autouse=True)
def _small_images_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (convolution, "_WORTH_A_FUNCTION"),
        (max_pool, "_WORTH_A_FUNCTION"),
        (max_pool, "_PIECE"),  # an image at a time
        (kernels, "_WORTH_A_MODE"),
        (kernels, "_WORTH_COMMUTING"),
    ):
        monkeypatch.setattr(module, name, 0)


def _tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@st.composite
def _convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, object]]:
    """Shapes of an input and a weight, and the settings, all of them legal."""
    pick = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    count, groups = pick(1, 3), pick(1, 2)
    kernel = [pick(1, 3) for _ in range(count)]
    how: dict[str, object] = {
        "stride": tuple(pick(1, 2) for _ in range(count)),
        "padding": draw(st.sampled_from([0, 1, (1,) * count])),
        "dilation": pick(1, 2),
        "groups": groups,
    }
    sides = [2 * k + pick(0, 2) for k in kernel]
    channels = pick(1, 2)
    x = (pick(1, 3), channels * groups, *sides)
    return x, (pick(1, 2) * groups, channels, *kernel), how


def _third_derivatives(function: object, tensors: list[Tensor]) -> list[Tensor]:
    """The gradient of the gradient of the gradient, each weighted by powers of itself."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = (function(*leaves) ** 3).sum()  # type: ignore[operator]
    found: list[Tensor] = []
    for _ in range(3):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found += grads
        value = sum((g**2).sum() for g in grads)  # type: ignore[assignment]
    return found


@settings(deadline=None, max_examples=30)
@given(_convolutions(), st.booleans())
def test_convolution_and_three_derivatives_are_torchs(case, biased) -> None:
    x_shape, w_shape, how = case
    tensors = _tensors(x_shape, w_shape, *([w_shape[:1]] if biased else []))
    function = CONVOLUTIONS[len(x_shape) - 2]
    expected = _third_derivatives(lambda *t: function(*t, **how), tensors)
    with FastKernels(second_order=True):
        found = _third_derivatives(lambda *t: function(*t, **how), tensors)
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(_convolutions())
def test_convolution_gradchecks(case) -> None:
    x_shape, w_shape, how = case
    leaves = [t.requires_grad_() for t in _tensors(x_shape, w_shape, w_shape[:1])]
    function = CONVOLUTIONS[len(x_shape) - 2]
    with FastKernels(second_order=True):
        assert "_Convolution" in type(function(*leaves, **how).grad_fn).__name__
        assert gradcheck(lambda *t: function(*t, **how), leaves)
        assert gradgradcheck(lambda *t: function(*t, **how), leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_convolution_when_not_all_tensors_require_a_gradient(wanted) -> None:
    def second(quick: bool) -> list[Tensor]:
        tensors = _tensors((2, 2, 5, 5), (3, 2, 3, 3), (3,))
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        learned = [t for t in leaves if t.requires_grad]
        with FastKernels(quick):
            y = F.conv2d(*leaves) * leaves[1].sum()
            grads = torch.autograd.grad((y**3).sum(), learned, create_graph=True)
            # What arrives at the gradients depends on each of them alone, too.
            return [
                found
                for g in grads
                for found in torch.autograd.grad(
                    (g**2).sum(), learned, retain_graph=True, allow_unused=True
                )
            ]

    for ours, torchs in zip(second(True), second(False), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)


POOLINGS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1)},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": 2, "ceil_mode": True},
]


@pytest.mark.parametrize("how", POOLINGS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pooling_and_its_derivatives_are_torchs(how, layout) -> None:
    (x,) = _tensors((2, 3, 7, 6))
    x = x.relu().contiguous(memory_format=layout)  # zeros: windows with several greatest values
    expected = _third_derivatives(lambda t: F.max_pool2d(t, **how), [x])
    with FastKernels(second_order=True):
        found = _third_derivatives(lambda t: F.max_pool2d(t, **how), [x])
        pooled = F.max_pool2d(x.requires_grad_(), **how)
        assert "_MaxPool2d" in type(pooled.grad_fn).__name__
        for check in (gradcheck, gradgradcheck):
            # From a seed of their own: among others two may be as near as the differences taken.
            assert check(lambda t: F.max_pool2d(t, **how), [x + _tensors(x.shape, seed=1)[0]])
    assert pooled.is_contiguous(memory_format=layout)
    assert torch.equal(pooled, F.max_pool2d(x, **how))
    for ours, torchs in zip(found, expected, strict=True):
        assert torch.equal(ours, torchs)


ACTIVATIONS = [
    lambda x: F.relu(x),
    lambda x: torch.relu(x),
    lambda x: x.relu(),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.leaky_relu(x, negative_slope=0.0),
]


class Counting(TorchDispatchMode):
    """Counts the values that ReLUs are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Calls ``func``."""
        if "relu" in str(func) or "clamp_min" in str(func):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batched", [False, True])
def test_pooling_before_an_activation_and_its_derivatives_are_torchs(activation, batched) -> None:
    (x,) = _tensors((3, 2, 3, 6, 6) if batched else (2, 3, 6, 6))
    x[..., :2, :2] = 0.5  # windows with several greatest values, of zeros and of no zeros
    x[..., 2:4, 2:4] = 0.0
    x[..., 4:, 4:] = -0.5
    one = lambda t: F.max_pool2d(activation(t), 2)  # noqa: E731
    function = vmap(one) if batched else one
    expected = _third_derivatives(function, [x])
    with FastKernels(second_order=True):
        found = _third_derivatives(function, [x])
        with Counting() as seen:
            assert torch.equal(function(x), function(x.clone()))
    assert seen.sizes == [x.numel(), x.numel() // 4] * 2
    for ours, torchs in zip(found, expected, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(F.leaky_relu(x, -0.2), 2),  # falls with its input
        lambda x: F.max_pool2d(F.relu(x * 1, inplace=True), 2),
        lambda x: F.max_pool2d(F.leaky_relu(x).add_(1), 2),
        lambda x: F.max_pool2d(_changed(F.leaky_relu(x)), 2),
        lambda x: F.max_pool2d(F.relu(x) + x, 2),
        lambda x: (F.relu(x), F.max_pool2d(x, 2))[1],
        lambda x: F.max_pool2d(F.relu(x), 2, return_indices=True)[0],
        lambda x: F.max_pool2d(torch.relu(input=x), 2),
        lambda x: F.max_pool2d(input=F.relu(x), kernel_size=2),
        lambda x: F.max_pool2d(F.elu(x), 2),
    ],
)
def test_other_pairs_are_torchs(function) -> None:
    (x,) = _tensors((2, 3, 6, 6))
    leaf = x.requires_grad_()
    expected = torch.autograd.grad((function(leaf) ** 2).sum(), leaf)
    with FastKernels(second_order=True):
        found = torch.autograd.grad((function(leaf) ** 2).sum(), leaf)
        assert torch.equal(function(leaf), function(leaf))
    assert torch.equal(found[0], expected[0])


def _changed(x: Tensor) -> Tensor:
    x.mul_(2)
    return x


def test_pooling_of_no_images_within_a_transform() -> None:
    with FastKernels(second_order=True):
        found = grad(lambda x: F.max_pool2d(x, 2).sum())(torch.ones(0, 2, 4, 4))
    assert found.shape == (0, 2, 4, 4)


def test_pooling_puts_nan_and_ties_where_torch_does() -> None:
    x = torch.tensor([[1.0, 1.0, 0.0, float("nan")], [1.0, 1.0, float("nan"), 2.0]])
    x = x.expand(1, 2, 2, 4).clone()

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(F.max_pool2d(leaf, 2), leaf, torch.ones(1, 2, 1, 2))[0]

    expected = gradient()
    with FastKernels(second_order=True):
        assert torch.equal(gradient(), expected)


def _net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 2)).double()


def _loss(params: dict[str, Tensor], net: nn.Module, x: Tensor) -> Tensor:
    return (torch.func.functional_call(net, params, (x,)) ** 3).sum()


def _meta_loss(params: dict[str, Tensor], net: nn.Module, x: Tensor) -> Tensor:
    inner = grad(_loss)(params, net, x)
    return _loss({name: p - 0.1 * inner[name] for name, p in params.items()}, net, x)


@pytest.mark.parametrize("least", [0, 10**9], ids=["ours", "torch's for want of size"])
@pytest.mark.parametrize("batched", ["images", "weights", "both"])
@pytest.mark.parametrize("second_order", [False, True])
def test_torch_func_transforms(second_order, batched, least, monkeypatch) -> None:
    for module in (convolution, max_pool):
        monkeypatch.setattr(module, "_WORTH_A_FUNCTION", least)
    net = _net()
    params = {name: p.detach() for name, p in net.named_parameters()}
    (x,) = _tensors((3, 2, 2, 4, 4))
    dims = (0 if batched != "images" else None, None, 0 if batched != "weights" else None)
    if batched != "images":
        scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
        params = {n: torch.stack([scale * p for scale in scales]) for n, p in params.items()}
    images = x if batched != "weights" else x[0]
    expected = vmap(grad(_meta_loss), dims)(params, net, images)
    with FastKernels(second_order):
        found = vmap(grad(_meta_loss), dims)(params, net, images)
    for name, ours in found.items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-9, atol=1e-9)


def test_hessians_of_a_function_under_vmap() -> None:
    net = _net()
    params = {name: p.detach() for name, p in net.named_parameters()}
    (x,) = _tensors((2, 2, 4, 4))
    loss = lambda bias: _loss({**params, "0.bias": bias}, net, x)  # noqa: E731
    expected = jacrev(jacrev(loss))(params["0.bias"])
    with FastKernels(second_order=True):
        found = jacrev(jacrev(loss))(params["0.bias"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@FORWARD_MODE
def test_forward_mode_of_values_and_gradients() -> None:
    net = _net()
    params = {name: p.detach() for name, p in net.named_parameters()}
    (x,) = _tensors((2, 2, 4, 4))
    tangents = {name: torch.ones_like(p) for name, p in params.items()}
    functions = [lambda p: _loss(p, net, x), grad(lambda p: _loss(p, net, x))]
    for function in functions:
        expected = jvp(function, (params,), (tangents,))[1]
        with FastKernels(second_order=True):
            found = jvp(function, (params,), (tangents,))[1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    bias = params["0.bias"]
    with FastKernels(second_order=True):
        second = jacfwd(grad(lambda b: _loss({**params, "0.bias": b}, net, x)))(bias)
    assert second.abs().max() > 0
    torch.testing.assert_close(second, second.T, rtol=1e-9, atol=1e-9)


@FORWARD_MODE
@pytest.mark.parametrize("kernel", ["convolution", "pooling"])
def test_forward_mode_through_a_graph_built_before(kernel) -> None:
    x, w = (t.requires_grad_() for t in _tensors((2, 2, 5, 5), (3, 2, 3, 3)))

    def tangents(quick: bool) -> list[Tensor]:
        with FastKernels(quick) if quick else nullcontext():
            y = F.conv2d(x, w) if kernel == "convolution" else F.max_pool2d(x, 2)
        with torch.autograd.forward_ad.dual_level():
            g = torch.autograd.forward_ad.make_dual(torch.ones_like(y), y.detach())
            grads = torch.autograd.grad(y, [x, w] if kernel == "convolution" else [x], g)
            return [torch.autograd.forward_ad.unpack_dual(dual).tangent for dual in grads]

    torch.testing.assert_close(tangents(True), tangents(False))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(x, w, padding="same"),
        lambda x, w: F.conv2d(x[0], w),
        lambda x, w: F.conv2d(x.detach(), w.detach()),
        lambda x, w: F.conv2d(x, w, stride=torch.tensor(2)),
        lambda x, w: F.max_pool2d(x, torch.tensor(2)),
        lambda x, w: F.max_pool2d(x[0], 2),
        lambda x, w: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x, w: torch.max_pool2d(x.to(torch.int32), 2),
    ],
)
def test_what_it_is_not_for_is_left_to_torch(call) -> None:
    x, w = (t.requires_grad_() for t in _tensors((2, 2, 6, 6), (3, 2, 3, 3)))
    try:
        expected = call(x, w)
    except RuntimeError:
        pytest.skip("this torch refuses it without the kernels, too")
    with FastKernels(second_order=True):
        found = call(x, w)
    laid = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    assert any(torch.equal(found, torchs) for torchs in (expected, call(*laid)))
    assert type(found.grad_fn) is type(expected.grad_fn)


def test_autocast_is_left_to_torch() -> None:
    x, w = (t.float().requires_grad_() for t in _tensors((2, 2, 6, 6), (3, 2, 3, 3)))
    with torch.autocast("cpu", torch.bfloat16), FastKernels(second_order=True):
        assert F.conv2d(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.conv2d(torch.ones(2, 3, 5, 5), torch.ones(4, 2, 3, 3, requires_grad=True)),
        lambda: F.conv2d(
            torch.ones(2, 2, 5, 5), torch.ones(4, 2, 3, 3, requires_grad=True), stride=(1, 1, 1)
        ),
        lambda: torch.conv1d(torch.ones(1, 2, 5, 5), torch.ones(4, 2, 3, 3, requires_grad=True)),
        lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 5),
        lambda: F.max_pool2d(torch.ones(1, 1, 4, 4), 2, padding=2),
    ],
)
def test_errors_are_torchs(call) -> None:
    with pytest.raises(RuntimeError) as expected:
        call()
    with FastKernels(second_order=True), pytest.raises(RuntimeError) as found:
        call()
    assert str(found.value).split(".")[0] == str(expected.value).split(".")[0]


def test_it_ends_with_its_block() -> None:
    x, w = (t.requires_grad_() for t in _tensors((1, 1, 4, 4), (1, 1, 3, 3)))
    with pytest.raises(KeyError), FastKernels(second_order=True):
        raise KeyError
    assert type(F.conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"


def test_first_order_leaves_graphs_to_torch() -> None:
    x, w = (t.requires_grad_() for t in _tensors((1, 1, 4, 4), (2, 1, 3, 3)))
    with FastKernels(second_order=False):
        y = F.conv2d(x, w)
        assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
        assert type(F.max_pool2d(y, 2).grad_fn).__name__ == "MaxPool2DWithIndicesBackward0"


class Pooling(nn.Module):
    """Pools by function; says by which kernel."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        """Returns the pooled images, or fails."""
        if self.broken:
            raise KeyboardInterrupt
        return F.max_pool2d(x, 2)


def _is_quick(net: nn.Module, x: Tensor) -> bool:
    return "_MaxPool2d" in type(net(x).grad_fn).__name__


class Flattening(nn.Module):
    """Flattens a feature map as forwards do, and one of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits; with a feature map that is read in three ways."""
        x = self.conv(x)
        size = self.conv.weight.view(len(self.conv.weight), -1).norm()
        like = x.view_as(torch.empty(len(x), 36))
        return self.head(x.view(x.size(0), -1)) + self.head(like * size)


@pytest.mark.parametrize("loop", ["bare", "higher", "torchopt", "task_batch_loss"])
def test_forwards_that_view_feature_maps(loop, monkeypatch) -> None:
    torch.manual_seed(0)
    net = Flattening().double()
    (x,) = _tensors((2, 5, 3, 5, 5))
    batch = (x, torch.arange(10).view(2, 5) % 2) * 2
    lslr = mpp.LSLR(net, 2)
    learned = [*net.parameters(), *lslr.parameters()]

    def gradient() -> tuple[Tensor, ...]:
        how = {"num_steps": 2, "all_step_losses": False}
        if loop == "task_batch_loss":
            loss = mpp.task_batch_loss(net, lslr, batch, F.cross_entropy, **how).loss
            return torch.autograd.grad(loss, learned)
        from mamlpp_ext.benchmark.per_task import Learner, task_loop

        name = "bare torch" if loop == "bare" else loop
        adapt = task_loop(name, Learner(net, lslr, False, True, 0.1))
        losses = [adapt(*task).loss for task in zip(*batch, strict=True)]
        return torch.autograd.grad(sum(losses) / 2, learned)

    found = gradient()
    monkeypatch.setattr(kernels, "_WORTH_A_MODE", 10**9)
    for ours, torchs in zip(found, gradient(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-9)


class Maps(nn.Module):
    """Returns feature maps, in a way that is chosen by a function of them."""

    def __init__(self, wrapped) -> None:
        super().__init__()
        self.conv, self.wrapped = nn.Conv2d(3, 4, 3), wrapped

    def forward(self, x: Tensor) -> object:
        """Returns the feature map, wrapped."""
        return self.wrapped(self.conv(x))


@pytest.mark.parametrize("wrapped", [lambda t: t, lambda t: [t, {"map": t}], lambda t: (t, "a")])
def test_feature_maps_are_returned_in_the_layout_of_the_images(wrapped) -> None:
    net, (x,) = Maps(wrapped), (t.float() for t in _tensors((2, 3, 5, 5)))
    with mpp.fast_kernels(net):
        maps = pytree.tree_leaves(net(x))
        assert all(t.is_contiguous() for t in maps if isinstance(t, Tensor))
        laid = pytree.tree_leaves(net(x.contiguous(memory_format=torch.channels_last)))
    assert all(
        t.is_contiguous(memory_format=torch.channels_last) for t in laid if isinstance(t, Tensor)
    )


def test_a_whole_forward_stays_channels_last() -> None:
    seen: list[bool] = []
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    net = mpp.convert_batchnorm(nn.Sequential(*layers, nn.Conv2d(4, 4, 3)), 1).double()
    for layer in net:
        layer.register_forward_hook(
            lambda _, __, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    with mpp.fast_kernels(net):
        net(_tensors((2, 1, 8, 8))[0])
    assert seen == [True] * 5


def test_calls_of_the_model_alone_are_quick() -> None:
    net, (x,) = Pooling(), _tensors((1, 1, 4, 4))
    x.requires_grad_()
    with mpp.fast_kernels(net):
        assert _is_quick(net, x)
        assert not _is_quick(Pooling(), x)
    assert not _is_quick(net, x)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_ends_when_a_call_fails(error) -> None:
    net, (x,) = Pooling(broken=error is KeyboardInterrupt), _tensors((1, 1, 4, 4))
    with pytest.raises(error), mpp.fast_kernels(net):
        net(x if net.broken else x[..., :1])
    assert torch.overrides._get_current_function_mode_stack() == []


def test_small_inputs_are_left_alone(monkeypatch) -> None:
    net, (x,) = Pooling(), _tensors((1, 1, 4, 4))
    monkeypatch.setattr(kernels, "_WORTH_A_MODE", x.numel() + 1)
    with mpp.fast_kernels(net):
        assert not _is_quick(net, x.requires_grad_())


def test_copies_made_inside_are_plain_outside() -> None:
    net, (x,) = Pooling(), _tensors((1, 1, 4, 4))
    x.requires_grad_()
    with mpp.fast_kernels(net):
        copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (copied, pickled):
        assert not _is_quick(other, x)
        with mpp.fast_kernels(other):
            assert _is_quick(other, x)


class Laid(nn.Module):
    """Says in what layout it is called."""

    def forward(self, x: Tensor) -> bool:
        """Returns whether ``x`` is channels_last."""
        return not x.is_contiguous()


@pytest.mark.parametrize("adapter", ["higher", "torchopt"])
def test_adapters_use_them(adapter) -> None:
    innerloop_ctx = importlib.import_module(f"mamlpp_ext.integrations.{adapter}").innerloop_ctx
    net = nn.Sequential(nn.Conv2d(1, 2, 3), Laid())
    (x,) = (t.float() for t in _tensors((1, 1, 6, 6)))
    with innerloop_ctx(net, mpp.LSLR(net, 1)) as inner:
        called = inner[0] if adapter == "higher" else net
        assert called(x)
    assert not net(x)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
def test_task_batch_loss_agrees_with_and_without(
    second_order, tasks, rematerialize, monkeypatch
) -> None:
    net = _net()
    batch = (
        *_tensors((tasks, 2, 2, 4, 4), (tasks, 2, 2)),
        *_tensors((tasks, 2, 2, 4, 4), (tasks, 2, 2), seed=1),
    )
    lslr = mpp.LSLR(net, 2)
    learned = [*net.parameters(), *lslr.parameters()]

    def gradient() -> tuple[Tensor, ...]:
        how = {"rematerialize": rematerialize, "second_order": second_order}
        result = mpp.task_batch_loss(net, lslr, batch, F.mse_loss, num_steps=2, **how)
        return torch.autograd.grad(result.loss, learned)

    found = gradient()
    monkeypatch.setattr(kernels, "_WORTH_A_MODE", 10**9)
    for ours, torchs in zip(found, gradient(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-9, atol=1e-9)


# Dynamo looks at every attribute of what it is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_code_is_left_to_torch(part) -> None:
    net, (x,) = _net(), _tensors((2, 2, 4, 4))
    expected = net(x)
    if part == "model":
        net = torch.compile(net, backend="eager", fullgraph=True)
    else:
        net[0] = torch.compile(net[0], backend="eager", fullgraph=True)
        net[2] = torch.compile(net[2], backend="eager", fullgraph=True)
    with mpp.fast_kernels(net):
        assert torch.equal(net(x), expected)


class Recursive(nn.Module):
    """Calls itself once with a small input, inside a mode of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the inner call leaves of that mode."""
        if x.numel() == 1:
            return x
        with torch.device("meta"):
            self(torch.ones(1, device="cpu"))
            return torch.zeros(2)


def test_a_call_within_a_call_ends_its_own_mode_alone(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_WORTH_A_MODE", 2)
    net = Recursive()
    with mpp.fast_kernels(net):
        assert net(torch.ones(4)).device.type == "meta"
        assert net(x=torch.ones(4)).device.type == "meta"
    assert torch.overrides._get_current_function_mode_stack() == []


class Waiting(nn.Module):
    """Stays in its call until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> int:
        """Returns how many modes are on."""
        if x.numel() > 1:
            self.begun.set()
            self.go_on.wait(20)
        return len(torch.overrides._get_current_function_mode_stack())


def test_threads_have_their_own(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_WORTH_A_MODE", 2)
    net, depths = Waiting(), []

    def other() -> None:
        depths.append(net(torch.ones(4)))
        depths.append(len(torch.overrides._get_current_function_mode_stack()))

    with mpp.fast_kernels(net):
        thread = threading.Thread(target=other)
        thread.start()
        assert net.begun.wait(20)
        assert net(torch.ones(1)) == 0
        net.go_on.set()
        thread.join()
    assert depths == [1, 0]


@pytest.mark.parametrize(
    "flat",
    [
        lambda x, w: F.max_pool2d(x[0].transpose(1, 2), 2).view(-1),
        lambda x, w: vmap(lambda image: F.max_pool2d(image, 2).view(2, -1))(x),
        lambda x, w: vmap(lambda image: F.conv2d(image, w).view(-1))(x),
        lambda x, w: vmap(lambda image: F.conv2d(image, w, w[:, 0, 0, 0]).view(-1))(x),
    ],
)
def test_feature_maps_can_be_viewed_as_torchs_can(flat) -> None:
    x, w = _tensors((3, 2, 2, 6, 6), (4, 2, 3, 3))
    expected = flat(x, w)
    with FastKernels(second_order=True):
        torch.testing.assert_close(flat(x, w), expected)


@pytest.mark.parametrize("many", [False, True])
def test_writing_to_a_view_of_a_feature_map_is_refused(many: bool) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        with FastKernels(True):
            features = F.conv2d(x, w)
            features.view(len(x), -1)[:, 0] = 0.0
        return features

    x, w = torch.randn(2, 3, 2, 20, 20), torch.randn(2, 4, 2, 3, 3)
    with pytest.raises(RuntimeError, match="writes in place to a view"):
        vmap(forward)(x, w) if many else forward(x[0], w[0])


@pytest.mark.parametrize("x", [torch.randn(5, 4, 3, 2).transpose(1, 2), torch.randn(6, 4).T])
def test_views_that_torch_refuses_are_refused(x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="view size is not compatible"), FastKernels(True):
        x.view(len(x), -1) if x.dim() == 4 else x.view(-1)
