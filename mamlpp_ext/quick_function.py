"""``torch.autograd.Function`` at less cost for each call."""

from __future__ import annotations

from typing import Any

import torch

# What torch.autograd.Function itself asks; not there, every call takes the longer way.
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class QuickFunction(torch.autograd.Function):
    """A Function whose ``apply`` skips what torch does there for the sake of torch.func alone.

    Binding the arguments to the forward's signature takes a third of a small layer's time.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Calls it; within a torch.func transform in torch's own way."""
        if transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
