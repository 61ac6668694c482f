"""Which parameters the inner loop adapts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mamlpp_ext.checks import listing
from mamlpp_ext.steps import per_step_layers

# None for all but those of per-step layers, a choice by name, or fnmatch patterns.
Adapt = Callable[[str], bool] | Iterable[str] | None


def select_parameters(module: nn.Module, adapt: Adapt) -> tuple[str, ...]:
    """Returns the names that ``adapt`` chooses, in the order of ``named_parameters()``.

    Raises:
        TypeError: if ``adapt`` is none of the forms of :data:`Adapt`.
        ValueError: if a pattern matches nothing, nothing is left, or the weights are adapted ones.
    """
    if any(p.grad_fn is not None for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} holds adapted weights instead of parameters: patched, or "
            "inside an inner loop; pass the original model, before the loop"
        )
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    if adapt is None:
        outer = {id(p) for layer in per_step_layers(module).values() for p in layer.parameters()}
        names = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in outer]
    elif callable(adapt):
        names = [name for name in trainable if adapt(name)]
    else:
        patterns = _patterns(adapt)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trainable):
                raise ValueError(
                    f"adapt pattern {pattern!r} matches no parameter that requires grad; there are "
                    f"{listing(trainable)}"
                )
        names = [n for n in trainable if any(fnmatchcase(n, pattern) for pattern in patterns)]
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
            "parameters: the model is inside an inner loop already, or patched; end that loop "
            "first, or pass the original model"
        )
    return {name: params[name] for name in names}


def _patterns(adapt: Any) -> list[str]:
    patterns = [adapt] if isinstance(adapt, str) else adapt
    patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
    if wrong:
        raise TypeError(
            "adapt must be None, a callable of the name, or fnmatch patterns such as ['head.*'], "
            f"got {wrong[0]!r} of type {type(wrong[0]).__name__}"
        )
    return patterns
