"""The inner update of many tensors at once: theta - rate * gradient, each with a rate of its own.

Composed of torch's operations its backward takes five calls for every tensor and step. In closed
form, with c the gradient that arrives at the updated tensor:

    to theta: c        to its gradient: -rate c        to the rate: -<c, gradient>
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mamlpp_ext.checks import listing
from mamlpp_ext.fast_kernels import QuickFunction, save
from mamlpp_ext.torch_private import (
    forward_mode_active,
    subtract_products,
    transforms_active,
)

# Up to so many tensors with so many values together torch's own derivatives take 0.8 to 0.95 of the
# closed form's time, beyond as much or up to twice as much, for their temporaries.
_FEW, _SMALL = 12, 30_000


def check_reached(names: Sequence[str], reached: Collection[str], step: int) -> None:
    """Raises if a step would adapt nothing.

    Args:
        names: what is adapted.
        reached: which of these have a gradient.
        step: the inner step.

    Raises:
        RuntimeError: if none has one.
    """
    if not reached:
        raise RuntimeError(
            f"every gradient of inner step {step} is None, so that nothing would be adapted: the "
            f"support loss depends on none of {listing(list(names))} as they are at this step; "
            "compute the support loss anew in every step, by the model that is adapted "
            "(fnet(x) in higher, not net(x); functional_call(net, params, x) in a loop of your own)"
        )


def check_shapes(
    names: Sequence[str], params: Mapping[str, Tensor], grads: Sequence[Tensor]
) -> None:
    """Raises if a gradient has another shape than its parameter.

    Raises:
        ValueError: if one has: broadcasting would silently make the parameter another one.
    """
    for name, grad in zip(names, grads, strict=True):
        if grad.shape != params[name].shape:
            raise ValueError(
                f"the gradient of '{name}' has shape {tuple(grad.shape)}, the parameter "
                f"{tuple(params[name].shape)}; they must be equal, so pass the gradient of this "
                "very tensor"
            )


def descend(params: Sequence[Tensor], grads: Sequence[Tensor], rates: Tensor) -> tuple[Tensor, ...]:
    """Returns every parameter less its rate times its gradient.

    Args:
        params: of any shapes.
        grads: of the same shapes; sparse ones count as dense.
        rates: real, [len(params)].
    """
    # An Embedding(sparse=True) has sparse gradients, which no formula here is for.
    grads = [g if g.layout == torch.strided else g.to_dense() for g in grads]
    if torch.compiler.is_compiling() or transforms_active() or not params:
        return descend_reference(params, grads, rates)
    if any(t.is_complex() for t in (*params, *grads)):
        return descend_reference(params, grads, rates)
    if _is_small(params, grads, rates):
        return tuple(subtract_products(params, grads, rates.unbind()))
    apply: Any = _Descend.apply
    return apply(rates, *params, *grads)  # type: ignore[no-any-return]


def _is_small(params: Sequence[Tensor], grads: Sequence[Tensor], rates: Tensor) -> bool:
    """Returns whether torch's own derivatives, without a Function's cost, are quicker."""
    if len(params) > _FEW or sum([param.numel() for param in params]) > _SMALL:
        return False
    alike = all(t.dtype == rates.dtype for t in (*params, *grads))
    return alike and not forward_mode_active()


def descend_reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], rates: Tensor
) -> tuple[Tensor, ...]:
    """What :func:`descend` computes, composed of differentiable operations."""
    triples = zip(params, grads, rates.unbind(), strict=True)
    return _alike([_less(*triple) for triple in triples], params)


def _less(param: Tensor, grad: Tensor, rate: Tensor) -> Tensor:
    if param.is_complex():  # the closed forms, and addcmul's own, are for real numbers
        return param - rate * grad
    return torch.addcmul(param, grad, rate, value=-1)


class _Descend(QuickFunction):
    """Its backward is made of differentiable operations, so that it has further derivatives."""

    @staticmethod
    def forward(rates: Tensor, *tensors: Tensor) -> Any:
        count = len(rates)
        params, grads = tensors[:count], tensors[count:]
        return _alike(subtract_products(params, grads, rates.unbind()), params)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        rates, *tensors = inputs
        grads = tensors[len(rates) :]
        save(ctx, rates, *grads)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> Any:
        rates, *grads = ctx.saved_tensors
        to_rates, *others = ctx.needs_input_grad
        slopes = scaled = None
        if to_rates:
            zero = rates.new_zeros(())
            pairs = zip(arrived, grads, strict=True)
            products = [zero if c is None else _inner_product(c, g) for c, g in pairs]
            slopes = torch.stack(products).neg()
        if any(others[len(grads) :]):
            pairs = zip(arrived, rates.neg().unbind(), strict=True)
            scaled = [None if c is None else c * rate for c, rate in pairs]
        return slopes, *arrived, *(scaled or [None] * len(grads))

    @staticmethod
    def jvp(ctx: Any, rates_moved: Tensor | None, *moved: Tensor | None) -> Any:
        rates, *grads = ctx.saved_tensors
        count, total = len(grads), []
        for i, (param, grad) in enumerate(zip(moved[:count], moved[count:], strict=True)):
            out = torch.zeros_like(grads[i]) if param is None else param
            out = out if grad is None else out - rates[i] * grad
            total.append(out if rates_moved is None else out - rates_moved[i] * grads[i])
        return _alike(total, grads)


def _alike(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # A 0-dim parameter in half precision would take on the dtype of the rates.
    pairs = zip(tensors, params, strict=True)
    return tuple([t if t.dtype == param.dtype else t.to(param.dtype) for t, param in pairs])


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != b.dtype:
        return (a * b).sum()
    if a.is_contiguous():
        return a.flatten().dot(b.flatten())
    if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):  # flat in this order
        return a.movedim(1, 3).flatten().dot(b.movedim(1, 3).flatten())
    return (a * b).sum()  # flattening would copy
