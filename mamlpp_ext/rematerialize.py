"""Trades time for memory: keep a function's inputs only, and run it again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rematerialized(
    run: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], captured: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Returns ``run(*inputs)`` without keeping its graph.

    ``torch.utils.checkpoint`` is not used because its non-reentrant form needs saved-tensor hooks,
    which torch.func transforms forbid, and its reentrant form refuses ``torch.autograd.grad``.

    Args:
        run: a pure function of tensors to a tuple of tensors; random numbers and autocast are
            replayed. In the backward it may leave out last outputs that no gradient arrives at.
        inputs: what it is called with.
        captured: further tensors that it uses and that gradients must reach.
    """
    apply: Any = _Rematerialized.apply
    return apply(run, len(inputs), *inputs, *captured)  # type: ignore[no-any-return]


class _Rematerialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], count: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.count = run, count
        kind = tensors[0].device.type
        ctx.devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        ctx.random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, ctx.devices)]
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return run(*tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in tensors[: ctx.count]]
        with torch.random.fork_rng(ctx.devices), torch.enable_grad(), torch.autocast(*ctx.autocast):
            torch.set_rng_state(ctx.random[0])
            for device, state in zip(ctx.devices, ctx.random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            outputs = ctx.run(*inputs)
        # The captured tensors enter as they are: `run` holds these very objects.
        targets = [*inputs, *tensors[ctx.count :]]
        wanted = [t for t in targets if t.requires_grad]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, cotangents, strict=False)
            if cotangent is not None and output.requires_grad
        ]
        outs, weights = [output for output, _ in pairs], [cotangent for _, cotangent in pairs]
        grads = iter(torch.autograd.grad(outs, wanted, weights, allow_unused=True))
        return None, None, *(next(grads) if t.requires_grad else None for t in targets)
