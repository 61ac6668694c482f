"""Every part of torch's own that is not public and that this package asks for.

Where one is missing, in a torch older or newer than the tested ones, the answer is the careful one:
results stay right, and what is only quicker is left out (``tests/test_torch_private.py`` takes each
away in turn). Elsewhere in the package no private name of torch stands but
``_load_from_state_dict``, which torch's own layers override as ours do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Literal

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
_pytree = _imported("torch.utils._pytree")
_batchnorm = _imported("torch.nn.modules.batchnorm")

# Hooks of one module, by the attributes that hold them.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Without an underscore, but in no documentation either.
_OPERATORS = (
    "batch_norm_update_stats",
    "convolution",
    "convolution_backward",
    "leaky_relu_backward",
    "max_pool2d_with_indices",
    "native_batch_norm",
    "native_batch_norm_backward",
    "threshold_backward",
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


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


def is_hooked(layer: nn.Module) -> bool:
    """Returns whether hooks are registered on this very module; missing: True."""
    about = vars(layer)
    return any(about.get(name, True) for name in _HOOKS)


def is_called_plainly(layer: nn.Module) -> bool:
    """Returns whether calling ``layer`` is calling the forward of its class; missing: False."""
    about = vars(layer)
    return not (is_hooked(layer) or "forward" in about or about.get("_compiled_call_impl"))


def is_batch_norm(layer: Any) -> bool:
    """Returns whether it is a batch norm of torch's; missing: of those with a public name."""
    return isinstance(layer, getattr(_batchnorm, "_BatchNorm", _BATCH_NORMS))


def keeps_statistics(layer: Any) -> bool:
    """Returns whether it is a norm of torch's with running statistics; missing: likewise."""
    is_norm = isinstance(layer, getattr(_batchnorm, "_NormBase", _NORMS))
    return is_norm and layer.running_mean is not None


def held(module: nn.Module, kind: Literal["parameters", "buffers", "modules"]) -> dict[str, Any]:
    """Returns the dict in which a module holds what is its own, None too.

    What torch refuses to register can be put there, as ``torchopt`` and ``higher`` do: a parameter
    that has a graph.

    Raises:
        NotImplementedError: if missing.
    """
    own: dict[str, Any] | None = getattr(module, f"_{kind}", None)
    if own is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not hold its {kind} as modules do in the versions of "
            f"torch that mamlpp_ext was tested with, and torch is {torch.__version__}; install one "
            "of those"
        )
    return own


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any] | None:
    """Returns a Function's ``apply`` without what torch adds for transforms; missing: None."""
    return getattr(super(torch.autograd.Function, function), "apply", None)


@cache
def has_operators() -> bool:
    """Returns whether the operators that the closed forms are made of are there."""
    return all(hasattr(torch.ops.aten, name) for name in _OPERATORS)


def subtract_products(
    params: Sequence[Tensor], grads: Sequence[Tensor], rates: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Returns each parameter less its rate times its gradient; missing: one after the other."""
    at_once = getattr(torch, "_foreach_addcmul", None)
    if at_once is not None:
        return at_once(params, grads, rates, value=-1)  # type: ignore[no-any-return]
    triples = zip(params, grads, rates, strict=True)
    return [torch.addcmul(param, grad, rate, value=-1) for param, grad, rate in triples]


def forget_workspaces() -> None:
    """Lets torch make new workspaces of its CUDA libraries for each stream; missing: does nothing.

    It keeps one for every stream, 67 MB. A CUDA graph is to have its own, in its own memory: one
    that it shared with another graph would be gone with that.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:
        forget()


def flatten_tree(tree: Any) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Any]]:
    """Returns the leaves of a tree, where each is in it (``['a'][0]``), and what makes it again.

    Missing: only tuples, lists and dicts are taken apart, not what was registered with torch.
    """
    parts = ("tree_flatten_with_path", "tree_unflatten", "keystr")
    if _pytree is None or not all(hasattr(_pytree, name) for name in parts):
        return _flattened(tree, "")
    pairs, spec = _pytree.tree_flatten_with_path(tree)
    names = [_pytree.keystr(path) for path, _ in pairs]
    return [leaf for _, leaf in pairs], names, lambda leaves: _pytree.tree_unflatten(leaves, spec)


def _flattened(tree: Any, name: str) -> tuple[list[Any], list[str], Any]:
    if type(tree) not in (tuple, list, dict):
        return [tree], [name], lambda leaves: leaves[0]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    inner = [_flattened(tree[key], f"{name}[{key!r}]") for key in keys]

    def rebuild(leaves: Sequence[Any]) -> Any:
        rest = iter(leaves)
        made = [make([next(rest) for _ in found]) for found, _, make in inner]
        return dict(zip(keys, made, strict=True)) if isinstance(tree, dict) else type(tree)(made)

    leaves = [leaf for found, _, _ in inner for leaf in found]
    return leaves, [path for _, paths, _ in inner for path in paths], rebuild


def missing_derivatives(grads: Iterable[Tensor | None]) -> list[str]:
    """Returns the operations in the graph of these gradients that torch has no derivative of.

    Missing, as the name of such nodes is torch's own: none; their backward then says so.
    """
    seen: set[Any] = set()
    stack = [grad.grad_fn for grad in grads if grad is not None and grad.grad_fn is not None]
    found = set()
    while stack:
        node: Any = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions if following is not None]
        if "NotImplemented" in node.name():
            found.add(_said_by(node))
    return sorted(found)


def _said_by(node: Any) -> str:
    """Returns what a node says for which there is no derivative."""
    for count in range(1, 16):  # of gradients that it takes
        try:
            node(*[None] * count)
        except TypeError:
            continue
        except RuntimeError as error:
            return str(error).removesuffix(" is not implemented").removeprefix("derivative for ")
    return str(node.name())
