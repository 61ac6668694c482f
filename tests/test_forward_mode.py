"""Forward-mode derivatives: of the closed-form batch norm, of layers, of an inner step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import mamlpp_ext as mpp
from mamlpp_ext.fast_kernels.batch_norm import batch_normalize
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward mode, when first used, compiles by what torch has deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

Function = Callable[..., Any]
SHAPES = [(6, 3), (2, 3), (4, 3, 5), (3, 2, 4, 3), (2, 4, 1, 1), (2, 3, 2, 3, 2)]
# Which of weight and bias are there.
AFFINE = [(True, True), (True, False), (False, True), (False, False)]


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def drawn(shape: tuple[int, ...], affine: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """Input, weight and bias, as far as they are there."""
    return [torch.randn(shape), *(torch.randn(shape[1]) for there in affine if there)]


def output_of(normalize: Function, affine: tuple[bool, bool] = (True, True)) -> Function:
    def output(x: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        weight, bias = (next(rest) if there else None for there in affine)
        return normalize(x, weight, bias, 0.1)[0]

    return output


def gradients(output: Function) -> Function:
    """All gradients of a nonlinear functional of ``output``, as a function of its arguments."""

    def gradient(*args: Tensor) -> Any:
        objective = grad(lambda *args: output(*args).pow(3).sum(), tuple(range(len(args))))
        return objective(*args)

    return gradient


def along(function: Function, tangents: list[Tensor]) -> Function:
    """The derivative of ``function`` in a direction, in forward mode."""
    return lambda *args: jvp(function, args, tuple(tangents))[1]


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_composition(shape: tuple[int, ...], affine: tuple[bool, bool]) -> None:
    args, tangents = drawn(shape, affine), drawn(shape, affine)
    found = []
    for function in (batch_normalize, batch_normalize_reference):
        output = output_of(function, affine)
        found.append([along(f, tangents)(*args) for f in (output, gradients(output))])
    close(*found)


@pytest.mark.parametrize("moved", range(3))
def test_one_argument_alone_moves(moved: int) -> None:
    args = drawn((4, 3, 5))
    found = []
    for function in (batch_normalize, batch_normalize_reference):

        def output(arg: Tensor, function: Function = function) -> Tensor:
            given = [arg if i == moved else other for i, other in enumerate(args)]
            return output_of(function)(*given)

        tangents = [args[moved].sin()]
        hvp = along(gradients(output), tangents)
        # Linear in the output, what arrives at the backward does not move.
        linear = along(grad(lambda arg, f=output: (f(arg) * args[0].cos()).sum()), tangents)
        found.append([f(args[moved]) for f in (along(output, tangents), hvp, linear)])
    close(*found)


def test_channels_last() -> None:
    args, tangents = drawn((3, 2, 4, 3)), drawn((3, 2, 4, 3))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        (x, *affine), (u, *moved) = args, tangents
        x, u = (t.contiguous(memory_format=layout) for t in (x, u))
        output = output_of(batch_normalize)
        functions = (output, gradients(output))
        found.append([along(f, [u, *moved])(x, *affine) for f in functions])
    close(*found)


@pytest.mark.parametrize("affine", AFFINE)
def test_forward_over_reverse_equals_reverse_over_reverse(affine: tuple[bool, bool]) -> None:
    args, tangents = drawn((4, 3, 5), affine), drawn((4, 3, 5), affine)
    gradient = gradients(output_of(batch_normalize, affine))

    def inner_product(*args: Tensor) -> Tensor:
        pairs = zip(gradient(*args), tangents, strict=True)
        return sum((g * t).sum() for g, t in pairs)  # type: ignore[return-value]

    close(along(gradient, tangents)(*args), grad(inner_product, tuple(range(len(args))))(*args))


def composed(order: str, output: Function, tangents: list[Tensor]) -> Function:
    """Derivatives of derivatives, the innermost last: f forward, r reverse."""
    for kind in reversed(order):
        output = along(output, tangents) if kind == "f" else summed(gradients(output))
    return output


def summed(function: Function) -> Function:
    """One tensor of several, so that they can be differentiated again."""
    return lambda *args: torch.cat([t.flatten() for t in function(*args)])


@pytest.mark.parametrize("graph", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("order", ["f", "ff", "fff", "fr", "rf", "ffr", "frf", "rff", "frr", "rfr"])
def test_orders_in_any_sequence(order: str, graph: bool) -> None:
    # torch loses the tangents of an outer jvp within an inner one's, without a word.
    args, tangents = drawn((4, 3, 2)), drawn((4, 3, 2))
    with torch.set_grad_enabled(graph):
        found = [
            composed(order, output_of(function), tangents)(*args)
            for function in (batch_normalize, batch_normalize_reference)
        ]
    close(*found, 1e-9)


def test_jacobians_and_hessian() -> None:
    args, every = drawn((4, 2)), (0, 1, 2)
    output = output_of(batch_normalize)
    close(jacfwd(output, every)(*args), jacrev(output, every)(*args))
    scalars = [
        lambda *args, f=function: output_of(f)(*args).pow(3).sum()
        for function in (batch_normalize, batch_normalize_reference)
    ]
    close(*[hessian(scalar, every)(*args) for scalar in scalars])


@pytest.mark.parametrize("shared", [False, True], ids=["own weights", "shared weights"])
@pytest.mark.parametrize("order", ["f", "fr", "ff", "frr"])
def test_inside_vmap_equals_tasks_in_turn(order: str, shared: bool) -> None:
    args, tangents = (
        [torch.stack(parts) for parts in zip(*(drawn((4, 3, 2)) for _ in range(3)), strict=True)]
        for _ in range(2)
    )
    if shared:
        args[1:] = [t[0] for t in args[1:]]
    dims = [0, *[None if shared else 0] * 2]

    def derivative(args: list[Tensor], tangents: list[Tensor]) -> Any:
        return composed(order, output_of(batch_normalize), tangents)(*args)

    tasks = [
        [t if dim is None else t[i] for t, dim in zip(args, dims, strict=True)] for i in range(3)
    ]
    moved = [[t[i] for t in tangents] for i in range(3)]
    expected = torch.stack([derivative(*task) for task in zip(tasks, moved, strict=True)])
    close(vmap(derivative, (dims, 0))(args, tangents), expected, 1e-10)


def test_over_vmap() -> None:
    x, weight, bias = torch.randn(5, 4, 3), torch.randn(5, 3), torch.randn(3)
    found = []
    for function in (batch_normalize, batch_normalize_reference):
        output = vmap(output_of(function), (0, 0, None))
        args = x, weight, bias
        moved = [t.cos() for t in args]
        found.append([along(f, moved)(*args) for f in (output, gradients(output))])
    close(*found)


def dual(tensors: list[Tensor], tangents: list[Tensor]) -> Iterator[Tensor]:
    for tensor, tangent in zip(tensors, tangents, strict=True):
        yield forward_ad.make_dual(tensor.clone().requires_grad_(), tangent)


def tangents_of(tensors: Any) -> list[Tensor]:
    return [forward_ad.unpack_dual(t).tangent for t in tensors]


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_dual_numbers(graph: bool) -> None:
    args, tangents = drawn((4, 3, 2)), drawn((4, 3, 2))
    found = []
    for function in (batch_normalize, batch_normalize_reference):
        output = output_of(function)
        with forward_ad.dual_level():
            inputs = list(dual(args, tangents))
            with torch.set_grad_enabled(graph):
                moved = tangents_of([output(*inputs)])
            loss = output(*inputs).pow(3).sum()
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            moved += tangents_of(first)
            moved += tangents_of(
                torch.autograd.grad(output(*inputs).pow(3).sum(), inputs, create_graph=graph)
            )
            loss = sum(g.pow(2).sum() for g in first)
            moved += tangents_of(torch.autograd.grad(loss, inputs, create_graph=graph))
        found.append(moved)
    close(*found, 1e-9)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 3), (2, 2, 2, 1)])
def test_finite_differences(shape: tuple[int, ...], affine: tuple[bool, bool]) -> None:
    inputs = [t.requires_grad_() for t in drawn(shape, affine)]
    output = output_of(batch_normalize, affine)
    assert gradcheck(output, inputs, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(output, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    (x, *affine), (u, *moves) = ([t.float() for t in drawn((8, 3, 4))] for _ in range(2))
    x, u = (x + 30).to(dtype), u.to(dtype)  # a mean that needs more than half precision
    found = []
    for cast in (Tensor.float, Tensor.clone):
        given, moved = [cast(x), *affine], [cast(u), *moves]
        output = output_of(batch_normalize)
        out, (dx, *others) = (along(f, moved)(*given) for f in (output, gradients(output)))
        assert out.dtype == dx.dtype == given[0].dtype
        found.append([t.float() / t.float().std() for t in (out, dx, *others)])
    torch.testing.assert_close(*found, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}])
def test_a_layer_moves_as_torchs(settings: dict[str, Any], mode: bool) -> None:
    layer, plain = mpp.PerStepBatchNorm2d(3, 2, **settings), nn.BatchNorm2d(3, **settings)
    for name, table in layer.named_parameters():
        table.data.normal_()
        plain.get_parameter(name).data.copy_(table[1])
    x, u = torch.randn(2, 4, 3, 2, 2)
    with mpp.at_step(layer, 1), mpp.frozen_statistics(layer.train(mode)):
        by_batch = jvp(layer, (x,), (u,))[1]
    close(by_batch, jvp_of_plain(plain, x, u))
    with mpp.at_step(layer, 1), forward_ad.dual_level():
        (moved,) = tangents_of([layer(forward_ad.make_dual(x, u))])
        (expected,) = tangents_of([plain.train(mode)(forward_ad.make_dual(x, u))])
        close(moved, expected)
        close_rows(layer, plain)


def jvp_of_plain(plain: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    def by_batch(x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, plain.weight, plain.bias, training=True)

    return jvp(by_batch, (x,), (u,))[1]


def close_rows(layer: nn.Module, plain: nn.Module) -> None:
    """Statistics are taken in once by each forward, and have no tangents."""
    if layer.running_mean is not None:
        close(layer.running_mean[1], plain.running_mean)
        close(layer.running_var[1], plain.running_var)
        assert layer.num_batches_tracked[1] == plain.num_batches_tracked
        assert tangents_of([layer.running_mean, layer.running_var]) == [None, None]


def test_a_jvp_that_would_lose_statistics_is_refused() -> None:
    layer, x = mpp.PerStepBatchNorm1d(3, 2), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"jvp.*frozen_statistics"):
        jvp(layer, (x,), (x,))


class OneStep(nn.Module):
    """The target loss after one inner step, as a function of every parameter and rate."""

    def __init__(self, net: nn.Module, lslr: mpp.LSLR) -> None:
        super().__init__()
        self.net, self.lslr = net, lslr

    def forward(self, task: tuple[Tensor, ...], slopes: Function) -> Tensor:
        x, y, x_target, y_target = task
        params = dict(self.net.named_parameters())
        chosen = {name: params[name] for name in self.lslr.names}
        rest = {name: p for name, p in params.items() if name not in chosen}

        def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional_call(self.net, {**rest, **chosen}, x).sub(y[:, None]).pow(2).mean()

        grads = slopes(lambda chosen: loss(chosen, x, y), chosen)
        return loss(self.lslr.update(chosen, grads, 1), x_target, y_target)


def by_autograd(loss: Function, params: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
    return dict(zip(params, grads, strict=True))


def test_through_an_inner_step(net: nn.Module, lslr: mpp.LSLR, task: tuple[Tensor, ...]) -> None:
    model = OneStep(net, lslr)
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    moved = {name: torch.randn_like(p) for name, p in params.items()}

    def meta_loss(params: dict[str, Tensor], slopes: Function) -> Tensor:
        return functional_call(model, params, (task, slopes))

    def product(grads: Any) -> Tensor:
        return sum((g * t).sum() for g, t in zip(grads, moved.values(), strict=True))  # type: ignore[return-value]

    with mpp.frozen_statistics(net):
        loss = meta_loss(params, by_autograd)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        assert all(g.count_nonzero() for g in grads)
        slope = product(grads)
        curvature = torch.autograd.grad(slope, list(params.values()))
        transformed = along(lambda params: meta_loss(params, lambda f, p: grad(f)(p)), [moved])
        close(transformed(params), slope)
        gradient = along(grad(lambda p: meta_loss(p, lambda f, p: grad(f)(p))), [moved])
        close(list(gradient(params).values()), list(curvature), 1e-10)
        with forward_ad.dual_level():
            duals = dict(zip(params, dual([*params.values()], [*moved.values()]), strict=True))
            loss = meta_loss(duals, by_autograd)
            close(tangents_of([loss]), [slope])
            grads = torch.autograd.grad(loss, list(duals.values()))
            close(tangents_of(grads), list(curvature), 1e-10)
