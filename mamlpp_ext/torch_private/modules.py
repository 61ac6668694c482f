"""What a module holds, and which are norms."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mamlpp_ext.torch_private.imported import imported

_batchnorm = imported("torch.nn.modules.batchnorm")
_HELD = {kind: f"_{kind}" for kind in ("parameters", "buffers", "modules")}
_OF_EVERY = vars(nn.Module()).keys()
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def is_batch_norm(layer: Any) -> bool:
    """Returns whether it is a batch norm of torch's; missing: of those with a public name.

    Not one that has been given rows for inner steps.
    """
    is_norm = isinstance(layer, getattr(_batchnorm, "_BatchNorm", _BATCH_NORMS))
    return is_norm and getattr(layer, "inner_step", None) is None


def keeps_statistics(layer: Any) -> bool:
    """Returns whether it is a norm of torch's with running statistics; missing: likewise."""
    is_norm = isinstance(layer, getattr(_batchnorm, "_NormBase", _NORMS))
    return is_norm and layer.running_mean is not None and getattr(layer, "inner_step", None) is None


def held(module: nn.Module, kind: Literal["parameters", "buffers", "modules"]) -> dict[str, Any]:
    """Returns the dict in which a module holds what is its own, None too.

    What torch refuses to register can be put there, as ``torchopt`` and ``higher`` do: a parameter
    that has a graph.

    Raises:
        NotImplementedError: if missing.
    """
    own: dict[str, Any] | None = getattr(module, _HELD[kind], None)
    if own is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not hold its {kind} as modules do in the versions of "
            f"torch that mamlpp_ext was tested with, and torch is {torch.__version__}; install one "
            "of those"
        )
    return own


def plain_names(own: dict[str, Any]) -> set[str]:
    """Returns those names of a module's dict that not every module has."""
    return own.keys() - _OF_EVERY


def hold_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Has a module hold its parameters in this dict; missing: it is one attribute more."""
    vars(module)["_parameters"] = parameters


def forget_compiled(module: nn.Module) -> None:
    """Has calls of a module run its forward, not what was compiled; missing: likewise."""
    vars(module)["_compiled_call_impl"] = None
