"""Every part of torch's own that is not public and that this package asks for.

Where one is missing, in a torch older or newer than the tested ones, the answer is the careful one:
results stay right, and what is only quicker is left out.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_functorch = _imported("torch._C._functorch")
_functions = _imported("torch._functorch.autograd_function")
_interpreters = _imported("torch._functorch.pyfunctorch")

# Hooks of one module, by the attributes that hold them.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def transforms_active() -> bool:
    """Returns whether a ``torch.func`` transform runs; missing: True, what works in any of them."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def only_vmap_active() -> bool:
    """Returns whether no transform but ``vmap`` runs; missing: False where one may run."""
    if not transforms_active():
        return True
    every = getattr(_interpreters, "retrieve_all_functorch_interpreters", None)
    return every is not None and all(map(_is_vmap, every()))


def innermost_vmap() -> Any:
    """Returns torch's interpreter of the transform that runs if it is ``vmap``; missing: None."""
    innermost = getattr(_interpreters, "retrieve_current_functorch_interpreter", None)
    interpreter = None if innermost is None else innermost()
    return interpreter if _is_vmap(interpreter) else None


def _is_vmap(interpreter: Any) -> bool:
    """Returns whether it is vmap's, and what a rule's call takes is there."""
    kind: Any = getattr(_interpreters, "VmapInterpreter", None)
    parts = (
        (_functorch, "_add_batch_dim"),
        (_functorch, "_unwrap_batched"),
        (_functions, "VmapInfo"),
        (torch._C, "DisableTorchFunction"),
    )
    there = kind is not None and all(hasattr(holder, name) for holder, name in parts)
    return there and isinstance(interpreter, kind)


def unwrapped(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    """Returns what a vmap of this level has wrapped and which dimension it maps, or None."""
    return _functorch._unwrap_batched(x, level)  # type: ignore[no-any-return]


def wrapped(x: Tensor, dim: int, level: int) -> Tensor:
    """Returns ``x`` with dimension ``dim`` mapped by the vmap of this level."""
    return _functorch._add_batch_dim(x, dim, level)  # type: ignore[no-any-return]


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


def in_backward() -> bool:
    """Returns whether this thread is within a backward; missing: whether its stack says so."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    if ask is not None:
        return bool(ask() >= 0)
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") in ("torch.autograd", "torch.autograd.graph"):
            return True
        frame = frame.f_back
    return False


def modes_active() -> bool:
    """Returns whether functions or operations are handed to somebody's mode; missing: True."""
    functions = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
    operations = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    return bool(functions() or operations())


def global_hooks() -> bool:
    """Returns whether hooks are registered on all modules; missing: True."""
    return bool(getattr(_module, "_has_any_global_hook", lambda: True)())


def is_called_plainly(layer: nn.Module) -> bool:
    """Returns whether calling ``layer`` is calling the forward of its class; missing: False."""
    about = vars(layer)
    hooked = any(about.get(name, True) for name in _HOOKS)
    return not (hooked or "forward" in about or about.get("_compiled_call_impl"))
