"""The closed-form batch norm against its composition of torch's operations."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import batch_norm

from mamlpp_ext.fast_kernels.batch_norm import batch_normalize
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference, normalize

SHAPES = [(6, 3), (2, 3), (4, 3, 5), (3, 2, 4, 3), (2, 4, 1, 1), (2, 3, 2, 3, 2)]


def draw(shape, affine=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [shape, *[(shape[1],)] * 2] if affine else [shape]
    tensors = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    return [t.requires_grad_() for t in tensors] + [None] * (3 - len(tensors))


def derivatives(function, args, order, eps=1e-3):
    """The output and its derivatives up to `order` along fixed nonlinear functionals."""
    inputs = [t for t in args if t is not None]
    results = [function(*args, eps)[0]]
    scalar = (results[0].sin() * results[0]).sum()
    for _ in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=True)
        results += grads
        scalar = sum((g.sin() * g).sum() for g in grads)
    return results


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_closed_form_equals_composition_up_to_third_derivatives(shape, affine):
    ours = derivatives(batch_normalize, draw(shape, affine), order=3)
    reference = derivatives(batch_normalize_reference, draw(shape, affine), order=3)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_double_backward_without_a_further_graph_equals_composition(affine, format):
    # The meta-gradient's path: only there the fused formula runs instead of a differentiable one.
    found = []
    for function in (batch_normalize, batch_normalize_reference):
        args = draw((4, 3, 5, 2), affine)
        inputs = [t for t in args if t is not None]
        x = args[0].contiguous(memory_format=format)
        output = function(x, *args[1:], 1e-3)[0]
        grads = torch.autograd.grad((output**3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in grads), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_double_backward_for_the_input_gradient_alone():
    # BatchNorm weights that the inner loop does not adapt: nothing arrives at dw and db.
    found = []
    for function in (batch_normalize, batch_normalize_reference):
        args = draw((4, 3, 5, 2))
        (dx,) = torch.autograd.grad(
            (function(*args, 1e-3)[0] ** 3).sum(), args[0], create_graph=True
        )
        found.append(torch.autograd.grad((dx**2).sum(), args, allow_unused=True))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_and_gradgradcheck(shape, affine):
    inputs = [t for t in draw(shape, affine) if t is not None]
    args = [None] * (3 - len(inputs))

    def output(*inputs):
        return batch_normalize(*inputs, *args, 0.1)[0]

    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None)])
def test_vmap_equals_a_loop_over_tasks(in_dims):
    sizes = [(4, 3, 5, 2), (3,), (3,)]
    shapes = [
        size if dim is None else (*size[:dim], 6, *size[dim:])
        for size, dim in zip(sizes, in_dims, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    stacked = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def objective(x, weight, bias):
        def inner(x, weight, bias):
            return (batch_normalize(x, weight, bias, 1e-3)[0] ** 3).sum()

        first = grad(inner, argnums=(0, 1, 2))(x, weight, bias)
        return sum((g**2).sum() for g in first)

    whole = [t.clone().requires_grad_() for t in stacked]
    vmap(objective, in_dims)(*whole).sum().backward()
    parts = [t.clone().requires_grad_() for t in stacked]
    for i in range(6):
        task = [t if d is None else t.select(d, i) for t, d in zip(parts, in_dims, strict=True)]
        objective(*task).backward()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_vmap_over_a_single_channel_in_channels_last():
    # A weight that the tasks share becomes a view of stride 0, which torch's kernels read past.
    x, weight, bias = draw((4, 5, 2, 3, 1))[0].detach().permute(3, 0, 4, 1, 2), *draw((2, 1))[1:]

    def slope(x):
        return grad(lambda x: (batch_normalize(x, weight, bias, 1e-3)[0] ** 3).sum())(x)

    torch.testing.assert_close(vmap(slope)(x), torch.stack([slope(task) for task in x]))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_is_as_accurate_as_torch_for_a_large_mean(offset):
    x = torch.randn(5, 4, 28, 28, generator=torch.Generator().manual_seed(2)) + offset
    exact = batch_normalize_reference(x.double(), None, None, 1e-5)[0]
    ours = (batch_normalize(x, None, None, 1e-5)[0] - exact).abs().max()
    torchs = (batch_norm(x, None, None, training=True) - exact).abs().max()
    assert ours <= 2 * torchs + 1e-5


def test_constant_input_has_zero_variance_and_finite_gradients():
    x = torch.full((4, 2, 3, 3), 7.0, requires_grad=True)
    output, mean, var = batch_normalize(x, None, None, 1e-5)
    output.sum().backward()
    assert torch.equal(mean, torch.full((2,), 7.0))
    assert torch.equal(var, torch.zeros(2))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_with_float32_weights(dtype):
    x, weight, bias = draw((8, 3, 4, 4), dtype=torch.float32)
    exact = batch_normalize_reference(x, weight, bias, 1e-5)[0]
    output = batch_normalize(x.to(dtype), weight, bias, 1e-5)[0]
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    (dx,) = torch.autograd.grad((output**2).sum().float(), x, create_graph=True)
    (dx**2).sum().backward()
    assert x.grad.isfinite().all()


def test_normalize_by_given_statistics_is_batch_norm_in_eval_mode():
    x, weight, bias = draw((4, 3, 5, 2))
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    ours = normalize(x, mean, var, weight, bias, 1e-5)
    torch.testing.assert_close(ours, batch_norm(x, mean, var, weight, bias))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.InstanceNorm1d])
def test_grad_inside_vmap_over_torchs_own_norms_is_still_wrong(norm):
    # The fact that forces closed_form.py, and task_loop.py to differentiate outside of vmap, for
    # each norm whose weight is adapted. When this fails, torch has mended it.
    torch.manual_seed(0)
    options = {"affine": True} if norm is nn.InstanceNorm1d else {}
    layers = [nn.Linear(4, 4), norm(4, **options), nn.Linear(4, 2)]
    if norm is nn.BatchNorm1d:
        layers[1].track_running_stats = layers[1].running_mean = layers[1].running_var = None
    net = nn.Sequential(*layers).double()
    x = torch.randn(3, *([4] * (2 + (norm is nn.InstanceNorm1d))), dtype=torch.float64)

    def objective(params, x):
        def inner(params):
            return functional_call(net, params, (x,)).sin().mean()

        grads = grad(inner)(params)
        return inner({name: p - 0.1 * grads[name] for name, p in params.items()})

    found = []
    for batched in (True, False):
        params = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
        tasks = [objective(params, task) for task in x]
        loss = vmap(objective, (None, 0))(params, x).sum() if batched else sum(tasks)
        found.append(torch.autograd.grad(loss, params["0.weight"])[0])
    assert not torch.allclose(*found, rtol=1e-6, atol=1e-9), "vmap now agrees with a loop"
