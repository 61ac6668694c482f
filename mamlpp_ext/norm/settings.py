"""What the rows of one conversion have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from mamlpp_ext.checks import ExtraSteps, checked_count, checked_extra_steps
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import held


class Settings(NamedTuple):
    """What the rows of one conversion have in common."""

    num_steps: int
    extra_steps: ExtraSteps
    inner_step: InnerStep


def checked_settings(
    function: str, module: Any, num_steps: Any, extra_steps: ExtraSteps
) -> Settings:
    """Returns what the rows of a conversion have in common.

    Raises:
        TypeError: if ``module`` is no module or ``num_steps`` no whole number.
        ValueError: if one is out of range, or the model holds adapted weights.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{function} takes a torch.nn.Module, got {type(module).__name__}; pass the model "
            "itself"
        )
    num_steps, extra_steps = checked_count("num_steps", num_steps), checked_extra_steps(extra_steps)
    for name, layer in module.named_modules():
        params = [p for p in held(layer, "parameters").values() if p is not None]
        if not all(isinstance(p, nn.Parameter) for p in params):
            raise ValueError(
                f"'{name or '(root)'}' ({type(layer).__name__}) holds adapted weights instead of "
                "parameters, so the model is inside an inner loop or patched already; convert the "
                "original model before the loop"
            )
    return Settings(num_steps, extra_steps, InnerStep())
