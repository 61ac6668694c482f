"""torch's weight_norm, whose fused kernel has a wrong second derivative (2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mamlpp_ext.torch_private.watchers import hooks_of

_weight_norm = getattr(torch, "_weight_norm", None)


def has_weight_norm(layer: nn.Module) -> bool:
    """Returns whether its weight is computed by weight_norm, the old (a hook) or the new one."""
    hooks = hooks_of(layer).get("_forward_pre_hooks", {}).values()
    kinds = [type(thing) for thing in (layer, *hooks)]
    return any(
        "WeightNorm" in kind.__name__ and kind.__module__.startswith("torch.nn.utils")
        for kind in kinds
    )


class DifferentiableWeightNorm(TorchFunctionMode):
    """Composes weight_norm of operations that can be differentiated twice; missing: does nothing.

    They are those that torch itself takes where its kernel does not apply.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is _weight_norm:
            return _composed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _composed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
