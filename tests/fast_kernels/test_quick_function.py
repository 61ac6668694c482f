"""Functions under vmap call their rules directly, and compute what torch's own way computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from mamlpp_ext import torch_private
from mamlpp_ext.fast_kernels.batch_norm import batch_normalize
from mamlpp_ext.fast_kernels.normalization import batch_normalize_reference


def _inner_inside(f):
    return lambda x, w: vmap(grad(lambda x, w: vmap(f)(x, w).sum(), (0, 1)))(x, w)


def _not_batched_at_the_inner_level(f):
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return lambda x, w: vmap(lambda task: vmap(lambda s: s * f(task[0], w[0, 0]))(scales))(x)


TRANSFORMS = {
    "vmap of vmap": lambda f: vmap(vmap(f)),
    "vmap of vmap of grad": lambda f: vmap(vmap(grad(f, (0, 1)))),
    "vmap of grad of vmap": _inner_inside,
    "grad of vmap of vmap": lambda f: grad(lambda x, w: vmap(vmap(f))(x, w).sum(), (0, 1)),
    "grad of grad": lambda f: vmap(vmap(grad(lambda x, w: grad(f)(x, w).square().sum(), (0, 1)))),
    "jvp": lambda f: vmap(vmap(lambda x, w: jvp(lambda x: f(x, w), (x,), (x.cos(),))[1])),
    "not batched at the inner level": _not_batched_at_the_inner_level,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_nested_transforms(transform, direct, monkeypatch) -> None:
    if not direct:
        monkeypatch.setattr(torch_private, "innermost_vmap", lambda: None)
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((3, 2, 4, 2, 3), (3, 2, 2))
    )
    bias = torch.tensor([0.5, -0.5], dtype=torch.float64)

    def through(normalize):
        def objective(x: Tensor, w: Tensor) -> Tensor:
            return normalize(x, w, bias, 1e-5)[0].sin().sum()

        return transform(objective)(x, w)

    torch.testing.assert_close(
        through(batch_normalize), through(batch_normalize_reference), rtol=1e-9, atol=1e-9
    )
