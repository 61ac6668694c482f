"""A model called with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mamlpp_ext.lslr.gradients import check_reentrant, without_hooks
from mamlpp_ext.lslr.places import Spot, places_of, spots_of
from mamlpp_ext.torch_private import flatten_tree

# The modes (training or not) in which a module's output was searched for reentrant checkpointing:
# once is enough, and the search goes through the whole graph.
_SEARCHED: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()


def functional_call(
    module: nn.Module,
    params: Mapping[str, Tensor],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Returns ``module(*args, **kwargs)`` with ``params`` in the place of its own.

    For loops of one's own: ``torch.func.functional_call`` for the weights of an inner loop. A
    weight that stands in several places (tied, or of a module under two names) is replaced in all
    of them, under whichever of its names it comes. torch's own function (2.13) puts it back wrongly
    where a module has two names: the module then holds an adapted weight. A model that runs layers
    again in the backward (activation checkpointing) is refused: by then other weights stand there.

    Args:
        module: the model.
        params: weights by their name in ``named_parameters()``, all or some; buffers too.
        args: a tuple of positional arguments, or a single one.
        kwargs: by name.

    Returns:
        What the module returns.

    Raises:
        KeyError: if a name is none of the model's.
        TypeError: if ``module`` is no module, or DataParallel, or ``params`` no dict.
        ValueError: if two names are of the same tensor.
        RuntimeError: if its forward checkpoints activations.

    Example:
        >>> net, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
        >>> params = dict(net.named_parameters())
        >>> loss = nn.functional.mse_loss(functional_call(net, params, x), y)
        >>> grads = dict(zip(params, torch.autograd.grad(loss, params.values())))
        >>> adapted = {name: p - 0.1 * grads[name] for name, p in params.items()}
        >>> functional_call(net, adapted, x).shape
        torch.Size([8, 1])

    Source:
        ``torch.func.functional_call``.
    """
    if not isinstance(module, nn.Module) or not isinstance(params, Mapping):
        raise TypeError(
            "functional_call takes a torch.nn.Module and a dict of weights by name, got "
            f"{type(module).__name__} and {type(params).__name__}; pass e.g. "
            "dict(model.named_parameters())"
        )
    places, args = places_of(module, params), args if isinstance(args, tuple) else (args,)
    with without_hooks():
        if _is_torchs(module):
            output = called(module, {p.path: params[p.name] for p in places}, args, kwargs)
        else:
            output = _called_with(module, [(p.spot, params[p.name]) for p in places], args, kwargs)
    searched = _SEARCHED.setdefault(module, set())
    if torch.is_grad_enabled() and module.training not in searched:
        for leaf in flatten_tree(output)[0]:
            if isinstance(leaf, Tensor):
                check_reentrant(leaf)
        searched.add(module.training)
    return output


def called(module: nn.Module, placed: dict[str, Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Returns what the module returns with tensors in these places.

    As ``torch.func.functional_call`` without ties, which is asked where a module holds one no more.
    """
    spots = spots_of(module, placed)
    if spots is None or _is_torchs(module):
        return torch.func.functional_call(module, placed, args, kwargs, tie_weights=False)
    return _called_with(module, [*zip(spots, placed.values(), strict=True)], args, kwargs)


def _is_torchs(module: nn.Module) -> bool:
    """Returns whether to leave a call to torch, which compiles it, or has its reason to refuse."""
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return traced or torch.compiler.is_compiling() or isinstance(module, torch.jit.ScriptModule)


def _called_with(
    module: nn.Module, placed: list[tuple[Spot, Tensor]], args: tuple[Any, ...], kwargs: Any
) -> Any:
    before = [own[key] for (own, key), _ in placed]
    try:
        for (own, key), tensor in placed:
            own[key] = tensor
        return module(*args, **(kwargs or {}))
    finally:
        for ((own, key), _), tensor in zip(placed, before, strict=True):
            own[key] = tensor
