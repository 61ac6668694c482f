"""Who sees a call or takes part in it: backwards, modes, hooks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

# Hooks of one module, by the attributes that hold them; of all, with _global before each.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    return any(getattr(_module, f"_global{name}", True) for name in _HOOKS)


def is_hooked(layer: nn.Module) -> bool:
    """Returns whether hooks are registered on this very module; missing: True."""
    about = vars(layer)
    return any(about.get(name, True) for name in _HOOKS)


def hooks_of(layer: nn.Module) -> dict[str, dict[int, Any]]:
    """Returns the hooks of this very module by the attribute that holds them; missing: none."""
    about = vars(layer)
    return {name: about[name] for name in _HOOKS if name in about}


def is_called_plainly(layer: nn.Module) -> bool:
    """Returns whether calling ``layer`` is calling the forward of its class; missing: False."""
    about = vars(layer)
    return not (is_hooked(layer) or "forward" in about or about.get("_compiled_call_impl"))
