"""A model called with other weights than its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr.gradients import check_reentrant, without_hooks
from mamlpp_ext.torch_private import flatten_tree, held

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
    placed = {place: params[name] for place, name in places_of(module, params).items()}
    with without_hooks():
        output = called(module, placed, args if isinstance(args, tuple) else (args,), kwargs)
    searched = _SEARCHED.setdefault(module, set())
    if torch.is_grad_enabled() and module.training not in searched:
        for leaf in flatten_tree(output)[0]:
            if isinstance(leaf, Tensor):
                check_reentrant(leaf)
        searched.add(module.training)
    return output


def called(module: nn.Module, placed: dict[str, Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Returns what the module returns with tensors in these places."""
    return torch.func.functional_call(module, placed, args, kwargs, tie_weights=False)


def places_of(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns every place in ``module`` of the tensors of these names, each with that name.

    Raises:
        KeyError: if a name is none of the model's.
        TypeError: if the model is a DataParallel.
        ValueError: if two are of the same tensor.
    """
    if isinstance(module, nn.DataParallel):
        raise TypeError(
            "DataParallel copies its own weights to every device, so that it cannot be called with "
            "others; pass the model in it, its .module (for several devices there is "
            "DistributedDataParallel around TaskBatchLoss)"
        )
    wanted = dict.fromkeys(names)
    found: dict[str, Tensor] = {}  # what stands under every name
    places: dict[str, Tensor] = {}  # the same, each place under its first name alone
    seen: set[int] = set()
    for path, layer in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        every = {**held(layer, "parameters"), **held(layer, "buffers")}
        own = {prefix + key: tensor for key, tensor in every.items() if tensor is not None}
        found |= own
        if id(layer) not in seen:
            seen.add(id(layer))
            places |= own
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise KeyError(
            f"{type(module).__name__} has no {listing(unknown)} (it has {listing(list(found))}); "
            "pass weights by their names in named_parameters()"
        )
    by_tensor: dict[int, str] = {}
    for name in wanted:
        other = by_tensor.setdefault(id(found[name]), name)
        if other != name:
            raise ValueError(
                f"'{other}' and '{name}' are one tensor of {type(module).__name__}, which cannot "
                "be two; pass it under one of the names, as dict(module.named_parameters()) does"
            )
    return {
        place: by_tensor[id(tensor)] for place, tensor in places.items() if id(tensor) in by_tensor
    }
