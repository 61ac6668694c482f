"""Which parameters the inner loop adapts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mamlpp_ext.checks import chosen_names, listing
from mamlpp_ext.steps import per_step_tables

# None for all but those of per-step layers, a choice by name, or fnmatch patterns.
Adapt = Callable[[str], bool] | Iterable[str] | None


def select_parameters(
    module: nn.Module, adapt: Adapt, rates: Collection[nn.Parameter] = ()
) -> tuple[str, ...]:
    """Returns the names that ``adapt`` chooses, in the order of ``named_parameters()``.

    Args:
        module: the model.
        adapt: as :class:`LSLR` takes it.
        rates: parameters that are no weights: those of tables that the model itself holds.

    Raises:
        TypeError: if ``adapt`` is none of the forms of :data:`Adapt`.
        ValueError: if a pattern matches nothing, nothing is left, the weights are adapted ones or
            not there yet, or the model is scripted.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"this {type(module).__name__} is scripted, and torch gives such a model no other "
            "weights than its own; adapt the model that it was made of, and script that after "
            "training"
        )
    lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{listing(lazy)} of {type(module).__name__} are lazy and have no shape yet; run one "
            "batch through the model first"
        )
    if any(p.grad_fn is not None for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} holds adapted weights instead of parameters: patched, or "
            "inside an inner loop; pass the original model, before the loop"
        )
    others = {id(p) for p in rates}
    weights = [(n, p) for n, p in module.named_parameters() if id(p) not in others]
    trainable = [name for name, p in weights if p.requires_grad]
    if adapt is None:
        outer = {id(table) for table in per_step_tables(module).values()}
        names = [name for name, p in weights if p.requires_grad and id(p) not in outer]
    else:
        names = chosen_names("adapt", adapt, trainable)
    if not names:
        raise ValueError(
            f"nothing is left to adapt in {type(module).__name__} with adapt={adapt!r}; parameters "
            f"that require grad: {listing(trainable)}"
        )
    return tuple(names)


def parameters_named(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Returns the parameters of these names, as :meth:`LSLR.parameters_of` describes."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected the model, a torch.nn.Module, got {type(module).__name__}; pass the "
            "model first and its LSLR second"
        )
    params = dict(module.named_parameters())
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(
            f"this LSLR adapts {listing(missing)}, which {type(module).__name__} does not "
            f"have (it has {listing(list(params))}); build the table from this model"
        )
    adapted = [name for name in names if not isinstance(params[name], nn.Parameter)]
    if adapted:
        raise ValueError(
            f"{listing(adapted)} of {type(module).__name__} are adapted weights instead of "
            "parameters: the model is inside an inner loop already, or patched, or a module has "
            "two names in it, where torch.func.functional_call leaves them; end that loop first, "
            "pass the original model, or call mamlpp_ext.functional_call"
        )
    return {name: params[name] for name in names}
