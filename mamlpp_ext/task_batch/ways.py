"""How a forward of one task runs for several: for one alone, by vmap, or by vmap of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import vjp, vmap

from mamlpp_ext.lslr import without_hooks
from mamlpp_ext.task_batch.adapted_model import AdaptedModel
from mamlpp_ext.task_batch.state import nothing_wrapped_left


def alone(model: AdaptedModel, function: Callable[..., Any], *args: Any) -> Any:
    """Runs it for one task, without the dimension T."""
    return function(*args)


def by_vmap(model: AdaptedModel, function: Callable[..., Any], *args: Any) -> Any:
    """Runs it for all tasks at once.

    Raises:
        RuntimeError: if vmap cannot.
    """
    on_cpu = next(iter(model.initial.values())).device.type == "cpu"
    # A checkpointed layer would be run again outside of the vmap.
    left = nothing_wrapped_left(model.modules)
    with model.unchanged_buffers(), left, _attention_with_rules(on_cpu), without_hooks():
        try:
            return vmap(function, randomness="different")(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the kind that vmap raises
            raise cannot_run(error)  # noqa: B904 - it has the cause


def cannot_run(reason: Exception | str) -> Exception:
    """Returns what to raise where several tasks cannot be run at once."""
    if isinstance(reason, Exception) and "pass chunk_size=1" in str(reason):
        return reason  # it says what to do
    found = RuntimeError(
        f"the model or its loss cannot be run for several tasks at once: {reason}".rstrip(". ")
        + ". Something in it has no right rule in torch.func.vmap, or depends on what vmap changes "
        "(strides, views that are written to, hooks of tensors, numbers taken out by .item()); "
        "pass chunk_size=1 to run the tasks one by one"
    )
    found.__cause__ = reason if isinstance(reason, Exception) else None
    return found


def by_vmap_of_gradient(model: AdaptedModel, function: Callable[..., Any], *args: Any) -> Any:
    """Runs it for all tasks at once, as if each would be differentiated there.

    For what vmap has no rule for as a whole (2.13: recurrent layers) a gradient takes it apart.
    """

    def differentiable(adapted: Any, *others: Any) -> Any:
        return vjp(lambda tensors: function(tensors, *others), adapted)[0]

    return by_vmap(model, differentiable, *args)


@contextmanager
def _attention_with_rules(on_cpu: bool) -> Iterator[None]:
    """Has torch (2.13) compute attention by what vmap has rules for.

    The fast path of encoder layers in eval mode, which they take where they see no gradient, as
    within vmap, has none; nor has the fused kernel of CPUs.
    """
    mha, cuda = torch.backends.mha, torch.backends.cuda
    fast_path: bool = mha.get_fastpath_enabled()
    flash: bool = cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    mha.set_fastpath_enabled(False)
    cuda.enable_flash_sdp(flash and not on_cpu)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fast_path)
        cuda.enable_flash_sdp(flash)
