"""Transforms of ``torch.func``, forward mode, and how a Function is called within them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mamlpp_ext.torch_private.imported import imported

_functorch = imported("torch._C._functorch")
_functions = imported("torch._functorch.autograd_function")
_interpreters = imported("torch._functorch.pyfunctorch")


def transforms_active() -> bool:
    """Returns whether a ``torch.func`` transform runs; missing: True, what works in any of them."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def only_vmap_active() -> bool:
    """Returns whether no transform but ``vmap`` runs; missing: False where one may run."""
    if not transforms_active():
        return True
    every = getattr(_interpreters, "retrieve_all_functorch_interpreters", None)
    return innermost_vmap() is not None and every is not None and all(map(_is_vmap, every()))


def innermost_vmap() -> Any:
    """Returns torch's interpreter of the transform that runs if it is ``vmap``; missing: None."""
    innermost = getattr(_interpreters, "retrieve_current_functorch_interpreter", None)
    if innermost is None or not hasattr(torch._C, "_are_functorch_transforms_active"):
        return None
    interpreter = innermost()
    return interpreter if _is_vmap(interpreter) else None


def _is_vmap(interpreter: Any) -> bool:
    """Returns whether it is vmap's, and what a rule's call takes is there."""
    kind: Any = getattr(_interpreters, "VmapInterpreter", None)
    parts = (
        (_functorch, "_add_batch_dim"),
        (_functorch, "_unwrap_batched"),
        (_functions, "VmapInfo"),
        (torch._C, "DisableTorchFunction"),
        *((kind, name) for name in ("level", "lower", "batch_size", "randomness")),
    )
    there = kind is not None and all(hasattr(holder, name) for holder, name in parts)
    return there and isinstance(interpreter, kind)


def unwrapped(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    """Returns what a vmap of this level has wrapped and which dimension it maps, or None."""
    return _functorch._unwrap_batched(x, level)  # type: ignore[no-any-return]


def wrapped(x: Tensor, dim: int, level: int) -> Tensor:
    """Returns ``x`` with dimension ``dim`` mapped by the vmap of this level."""
    return _functorch._add_batch_dim(x, dim, level)  # type: ignore[no-any-return]


def is_wrapped(x: Tensor) -> bool:
    """Returns whether it is of the inside of a transform, over or not; missing: True."""
    ask = getattr(_functorch, "is_functorch_wrapped_tensor", None)
    return True if ask is None else bool(ask(x))


def vmap_info(interpreter: Any) -> Any:
    """Returns what a Function's rule for vmap is told of it."""
    return _functions.VmapInfo(interpreter.batch_size(), interpreter.randomness())


def modes_hidden() -> AbstractContextManager[Any]:
    """Hides calls from subclasses and modes, which see a Function as a whole, if at all."""
    return torch._C.DisableTorchFunction()


def forward_mode_active() -> bool:
    """Returns whether tensors may carry tangents (``jvp``, dual numbers); missing: True."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def takes_closed_forms(*tensors: Tensor | None) -> bool:
    """Returns whether these may be computed with by formulas of one order; missing: False.

    Not within a transform, nor with tangents, nor by ``is_grads_batched``, whose tensors (2.13) are
    of an older vmap, which is no transform and lacks rules.
    """
    older = getattr(_functorch, "is_legacy_batchedtensor", lambda x: True)
    batched = any(older(t) for t in tensors if t is not None)
    return not (batched or transforms_active() or forward_mode_active())


def forward_mode_enabled() -> AbstractContextManager[Any]:
    """Lets operations within a Function's ``jvp`` move the tangents of enclosing transforms.

    Raises:
        NotImplementedError: if missing, as the tangents would be lost without a word.
    """
    enabled = getattr(forward_ad, "_set_fwd_grad_enabled", None)
    if enabled is None:
        raise NotImplementedError(
            f"forward mode through per-step layers and the inner update needs a part that torch "
            f"{torch.__version__} does not have; use reverse mode (torch.func.grad, vjp), or a "
            "torch that mamlpp_ext was tested with"
        )
    return enabled(True)  # type: ignore[no-any-return]


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any] | None:
    """Returns a Function's ``apply`` without what torch adds for transforms; missing: None."""
    return getattr(super(torch.autograd.Function, function), "apply", None)
