"""Tables: tensors with a row for every inner step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import ExtraSteps, checked_count, checked_extra_steps, select_row
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


def table_of(plain: Tensor, num_steps: int) -> Tensor:
    """Returns ``plain`` [...] in every row of a new tensor [num_steps, ...].

    Each row lies in memory as ``plain`` does (channels_last, for instance).
    """
    plain = plain.detach()
    strides = torch.empty_like(plain, device="meta").stride()
    shape = (num_steps, *plain.shape)
    table = plain.new_empty_strided(shape, (plain.numel(), *strides))
    return table.copy_(plain.expand(shape))


def current_place(layer: Any) -> int:
    """Returns which row a per-step layer uses at the current inner step.

    Raises:
        RuntimeError: within a backward, unless inside :func:`at_step`.
        ValueError: for an inner step beyond the rows.
    """
    step = layer.inner_step
    if layer.num_steps > 1 and step.called_in_backward:
        raise RuntimeError(
            f"{type(layer).__name__} is called within a backward, as activation checkpointing "
            f"does, and cannot know of which inner step (its position is {step.index}); turn "
            "checkpointing off, use task_batch_loss(rematerialize=True) instead, or make the call "
            "inside at_step"
        )
    return select_row(step.index, layer.num_steps, layer.extra_steps, type(layer).__name__)


def spread_over_rows(
    state_dict: dict[str, Any], prefix: str, tables: Iterable[tuple[str, Tensor | None]]
) -> None:
    """Puts the tensors of a plain layer's checkpoint into every row; tables stay as they are."""
    for name, table in tables:
        value = state_dict.get(prefix + name)
        if table is not None and value is not None and value.dim() == table.dim() - 1:
            state_dict[prefix + name] = value.repeat(len(table), *[1] * value.dim())
