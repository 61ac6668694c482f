"""The two halves of an inner step, each traced to a graph once and compiled, for every step alike.

The halves are the support gradient and the target loss; the update between them stays as it is. The
unrolled loop would take minutes to compile, and ``torch.compile`` refuses to differentiate through
a gradient, so each half has a second graph for its backward, which begins with its forward again:
no activations are kept, as with ``rematerialize``. Of per-step tables a half's input is the row of
its step, so that one graph serves all steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamlpp_ext.batch_norm import _PerStepBatchNorm
from mamlpp_ext.steps import per_step_layers, select_row
from mamlpp_ext.task_step import Given, Params, Step

Function = Callable[..., tuple[Tensor, ...]]
# Compiling takes seconds: it must outlast a call of task_batch_loss, as torch.compile's own cache.
_COMPILED: WeakKeyDictionary[nn.Module, dict[Hashable, _Half]] = WeakKeyDictionary()
_MOST = 16


def run_compiled(step: Step, adapted: Params) -> tuple[Tensor, ...]:
    """Returns what ``step`` returns, by its compiled halves, which are made when first needed.

    Raises:
        TypeError: if a per-step layer is none of this package's.
        ValueError: if a half draws random numbers, or the inner loop adapts a per-step layer.
        RuntimeError: if there are too many variants of them.
    """
    inner, placed, places = step.inner, _placed(step), []

    def gradients(weights: Params, given: Given) -> tuple[Tensor, ...]:
        grads, *seen = step.gradients(weights, given)
        pairs = zip(weights.values(), grads, strict=True)
        return *(torch.zeros_like(p) if grad is None else grad for p, grad in pairs), *seen

    def run(function: Any, weights: Params, differentiable: int) -> tuple[Tensor, ...]:
        def flat_function(*flat: Tensor) -> tuple[Tensor, ...]:
            step.check_mode()
            rest = iter(flat)
            there = [{name: next(rest) for name in group} for group in (weights, placed)]
            return function(there[0], Given(tuple(rest), 0, there[1]))  # type: ignore[no-any-return]

        flat = [*weights.values(), *placed.values(), *step.data]
        half = _half(step, flat_function, function.__name__, flat)
        places.extend(half.layers)
        apply: Any = _Run.apply
        return apply(half, flat_function, differentiable, *flat)  # type: ignore[no-any-return]

    count = len(adapted)
    outputs = run(gradients, adapted, count if inner.second_order else 0)
    named = dict(zip(adapted, outputs, strict=False))
    updated, seen = inner.lslr.update(adapted, named, step.step), outputs[count:]
    if step.counts or inner.all_step_losses:
        losses, logits, *seen_later = run(step.targets, updated, int(step.counts))
    else:
        losses, logits, seen_later = *step.no_targets(), []
    layers = dict(inner.model.named_modules())
    step.places = [(layers[name], _row(step, layers[name])) for name in places]
    return *updated.values(), losses, logits, *seen, *seen_later


def _placed(step: Step) -> Params:
    """Returns what a step reads of the model but adapted tensors, of per-step tables its row."""
    adapted, placed = step.inner.places, {}
    for name, layer in per_step_layers(step.inner.model).items():
        if not isinstance(layer, _PerStepBatchNorm):
            raise TypeError(
                f"compile=True knows the tables of PerStepBatchNorm alone, not those of '{name}' "
                f"({type(layer).__name__}); use compile=False"
            )
    for path, module in step.inner.model.named_modules():
        per_step = isinstance(module, _PerStepBatchNorm)
        # In training a per-step layer does not read its statistics, and they change after the step.
        buffers = {} if per_step and module.training else module._buffers
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            place = f"{path}.{key}" if path else key
            if tensor is None:
                continue
            if place in adapted and per_step:
                raise ValueError(
                    f"compile=True gives a step its row alone of '{place}', and the inner loop "
                    "adapts the whole; leave it out by LSLR's adapt, or use compile=False"
                )
            if place not in adapted:
                placed[place] = tensor.narrow(0, _row(step, module), 1) if per_step else tensor
    return placed


def _row(step: Step, layer: Any) -> int:
    return select_row(step.step, layer.num_steps, layer.extra_steps, type(layer).__name__)


class _Half:
    """The graphs of one half.

    Attributes:
        layers: the names of the layers whose statistics are its last outputs.
    """

    def __init__(self, forward: Function, layers: list[str]) -> None:
        self.forward, self.layers = forward, layers
        self.backward: dict[Hashable, Function] = {}


def _half(step: Step, function: Function, name: str, flat: list[Tensor]) -> _Half:
    inner, kind = step.inner, flat[0].device.type
    known = _COMPILED.setdefault(inner.model, {})
    # All that decides what the graphs compute, besides the values of tensors.
    key = (
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in flat),
        (name, inner.loss_fn, inner.second_order, step.single, step.mode),
        (*inner.initial, *inner.places),
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
    )
    if key not in known:
        if len(known) >= _MOST:
            raise RuntimeError(
                f"compile=True has compiled {_MOST} variants of this model's inner step; pass the "
                "same loss_fn object and batches of the same shapes each time, or compile=False"
            )
        step.places = []
        graph = _graph(torch.no_grad()(function), flat)
        names = {id(layer): name for name, layer in inner.model.named_modules()}
        known[key] = _Half(graph, [names[id(layer)] for layer, _ in step.places])
    return known[key]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, half: _Half, function: Function, differentiable: int, *flat: Tensor
    ) -> Any:
        ctx.half, ctx.function, ctx.differentiable = half, function, differentiable
        ctx.save_for_backward(*flat)
        outputs = half.forward(*flat)
        ctx.mark_non_differentiable(*outputs[differentiable:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        count = len(ctx.saved_tensors)

        def backward(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            flat = [t.detach() for t in tensors[:count]]
            sources = [flat[i].requires_grad_() for i in wanted]
            with torch.enable_grad():
                pairs = zip(ctx.function(*flat), tensors[count:], strict=False)
                outputs, arrived = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
            return torch.autograd.grad(outputs, sources, arrived, allow_unused=True)

        tensors = [*ctx.saved_tensors, *cotangents[: ctx.differentiable]]
        known, key = ctx.half.backward, (*wanted,)
        if key not in known:
            known[key] = _graph(backward, tensors)
        grads: list[Tensor | None] = [None] * count
        for i, grad in zip(wanted, known[key](*tensors), strict=True):
            grads[i] = grad
        return None, None, None, *grads


def _graph(function: Any, examples: list[Tensor]) -> Function:
    """Returns ``function``, traced on ``examples`` and compiled."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    traced = make_fx(function)(*(t.detach() for t in examples))
    seeded = torch.Tag.nondeterministic_seeded
    random = [n.target for n in traced.graph.nodes if seeded in getattr(n.target, "tags", ())]
    if random:
        raise ValueError(
            "compile=True cannot draw the same random numbers again in the backward, and the model "
            f"draws some ({', '.join(map(str, random))}); take out dropout, or use compile=False"
        )
    kind = examples[0].device.type

    def run(graph: Any, tensors: Any) -> Any:
        # Casts to lower precision are in the graph already.
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return graph(*tensors)

    graph: Any = torch.compile(traced, dynamic=False)
    try:
        run(graph, examples)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"compile=True: torch.compile failed ({reason}), so the traced step runs as it is; "
            "install a C++ compiler, or use compile=False",
            stacklevel=2,
        )
        graph = traced
    return lambda *tensors: run(graph, tensors)
