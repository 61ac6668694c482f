"""The buffers of a model, put back where an inner loop fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mamlpp_ext.torch_private import held


@contextmanager
def buffers_kept_on_error(net: nn.Module) -> Iterator[None]:
    """Puts every buffer of ``net`` back as it was if an exception ends the block."""
    kept = [
        (own, name, buffer, buffer.clone())
        for own in [held(module, "buffers") for module in net.modules()]
        for name, buffer in own.items()
        if buffer is not None
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for own, name, buffer, before in kept:
                buffer.copy_(before)
                own[name] = buffer  # a forward may have put another in its place
        raise
