"""Trades time for memory: keep a function's inputs only, and run it again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamlpp_ext.task_batch.generators import Generators


class OutputMemory:
    """Where the outputs of many rematerialised calls are kept, in few large blocks.

    Each in memory of its own would lie somewhere in what the call's graph has left free, the next
    graph would not fit there again, and the process would grow as if graphs were kept (measured
    with glibc: twice the memory at 20 calls). The caching allocator of a GPU does not need it. Any
    of them that is still held keeps its whole block.

    Args:
        values: how many there will be, roughly.
    """

    def __init__(self, values: int) -> None:
        self.values = max(values, 1)
        self.blocks: dict[torch.dtype, tuple[Tensor, int]] = {}

    def put(self, tensor: Tensor) -> Tensor:
        """Returns a copy, in the same layout; on a GPU the tensor itself."""
        if tensor.device.type != "cpu":
            return tensor
        block, used = self.blocks.get(tensor.dtype, (tensor.new_empty(0), 0))
        if used + tensor.numel() > len(block):
            size = max(self.values, tensor.numel())
            block, used = tensor.new_empty(size), 0
        self.blocks[tensor.dtype] = block, used + tensor.numel()
        strides = torch.empty_like(tensor, device="meta").stride()
        # Plain .data: every copy counts its changes by itself, as a tensor of its own would.
        return block.data.as_strided(tensor.shape, strides, used).copy_(tensor)


def rematerialized(
    run: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    captured: Sequence[Tensor],
    memory: OutputMemory | None,
) -> tuple[Tensor, ...]:
    """Returns ``run(*inputs)`` without keeping its graph.

    ``torch.utils.checkpoint`` is not used because its non-reentrant form needs saved-tensor hooks,
    which torch.func transforms forbid, and its reentrant form refuses ``torch.autograd.grad``.

    Args:
        run: a pure function of tensors to a tuple of tensors; random numbers and autocast are
            replayed. In the backward it may leave out last outputs that no gradient arrives at.
        inputs: what it is called with.
        captured: further tensors that it uses and that gradients must reach; others get none.
        memory: takes the outputs; None to keep the graph after all, for the first backward: the
            call then costs what a plain one costs, and its gradients reach the same tensors.
    """
    apply: Any = _Rematerialized.apply
    return apply(run, len(inputs), memory, *inputs, *captured)  # type: ignore[no-any-return]


class _Rematerialized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], count: int, memory: OutputMemory | None, *tensors: Tensor
    ) -> Any:
        ctx.run, ctx.count, ctx.kept, ctx.total = run, count, None, len(tensors)
        kind = tensors[0].device.type
        ctx.generators = Generators(tensors)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.set_materialize_grads(False)
        if memory is None:
            ctx.save_for_backward(*tensors)
            with torch.enable_grad():
                inputs = detached(tensors[:count])
                ctx.kept = inputs, run(*inputs)
            return tuple(output.detach() for output in ctx.kept[1])
        outputs = tuple(map(memory.put, run(*tensors[:count])))
        ctx.save_for_backward(*tensors, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        (inputs, outputs), ctx.kept = ctx.kept or _again(ctx), None  # a second backward runs again
        tensors = tensors[: ctx.total]
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
        reached = (next(grads) if t.requires_grad else None for t in targets)
        return None, None, None, *reached


def _again(ctx: Any) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Runs the function once more; returns its inputs and outputs, joined by a graph."""
    inputs = detached(ctx.saved_tensors[: ctx.count])
    drawn = torch.random.fork_rng(ctx.generators.devices)
    with drawn, torch.enable_grad(), torch.autocast(*ctx.autocast):
        ctx.generators.put_back()
        outputs = ctx.run(*inputs)
        _check_the_same(outputs, ctx.saved_tensors[ctx.total :])
        return inputs, outputs


@torch.no_grad()
def _check_the_same(outputs: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    """Says if a second run has come to something else than the first, by more than rounding."""
    for again, before in zip(outputs, first, strict=False):
        if not before.is_floating_point() or not before.numel():
            continue
        apart, largest = (again - before).abs().max(), before.abs().max()
        if apart > 100 * torch.finfo(before.dtype).eps ** 0.5 * largest:
            raise RuntimeError(
                "the backward of a rematerialised task_batch_loss has run a step's forward again "
                f"and come to something else: {float(apart):.2g} apart where the largest is "
                f"{float(largest):.2g}. It depends on what has changed since (numbers drawn by "
                "another generator than torch's, a counter, a context that is closed); keep that "
                "as it was until the backward, or pass rematerialize=False (chunk_size saves "
                "memory, too)"
            )


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors as leaves of a graph of their own, those that learn as such."""
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]
