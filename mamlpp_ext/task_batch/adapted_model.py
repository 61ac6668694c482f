"""A model that is called with other weights than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr import LSLR, checked_lslr
from mamlpp_ext.steps import checked_counters

Params = dict[str, Tensor]


class AdaptedModel:
    """A model, its rates, and which of its tensors the inner loop adapts.

    Args:
        model: the model, holding its parameters.
        lslr: its rates.
        num_steps: how many inner steps its per-step layers must have rows for.

    Attributes:
        initial: what the rates adapt, by name.
        adapting: the names of those that are not frozen.
        counters: of the per-step layers.

    Raises:
        TypeError: if ``lslr`` is no LSLR.
        ValueError: if the rates are another model's or all frozen, or a step is out of range.
    """

    def __init__(self, model: nn.Module, lslr: LSLR, num_steps: int) -> None:
        self.model, self.lslr = model, checked_lslr(lslr)
        self.initial = lslr.parameters_of(model)
        self.adapting = [name for name, p in self.initial.items() if p.requires_grad]
        if not self.adapting:
            raise ValueError(
                f"every parameter that this LSLR adapts ({listing(list(self.initial))}) is frozen; "
                "call requires_grad_(True) on them, or build an LSLR with another adapt"
            )
        self.counters = checked_counters(model, num_steps - 1)
        self.modules = list(model.modules())
        self.places = _places(model, self.initial)

    def __call__(self, adapted: Params, x: Any) -> Any:
        """Returns what the model returns for ``x`` with the adapted tensors in place."""
        placed = {place: adapted[name] for place, name in self.places.items()}
        return functional_call(self.model, placed, (x,), tie_weights=False)

    def learned_outside(self) -> list[Tensor]:
        """Returns the model's parameters that the outer loop alone learns."""
        outer = (p for name, p in self.model.named_parameters() if name not in self.initial)
        return [p for p in outer if p.requires_grad]

    def mode(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Returns what decides how the layers compute, besides their tensors."""
        frozen = tuple(counter.frozen for counter in self.counters)
        return tuple(module.training for module in self.modules), frozen


def _places(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns every place that holds one of ``params``, and under which name it goes.

    Left to ``functional_call``, tied weights are put back wrongly where a module stands in two
    places (torch 2.13): the second name finds the replacement and takes it for the original.
    """
    names = {id(p): name for name, p in params.items()}
    return {
        f"{path}.{key}" if path else key: names[id(p)]
        for path, module in model.named_modules()  # a shared module comes once
        for key, p in module._parameters.items()
        if id(p) in names
    }
