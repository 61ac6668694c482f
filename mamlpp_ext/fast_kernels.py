"""Quicker ways to compute what some of torch's layers compute, within a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mamlpp_ext.convolution import convolution
from mamlpp_ext.max_pool import max_pool2d

_POOLING: dict[Any, Callable[..., Any]] = {
    function: partial(max_pool2d, function) for function in (torch.max_pool2d, F.max_pool2d)
}
_CONVOLUTIONS: dict[Any, Callable[..., Any]] = {
    function: partial(convolution, function)
    for function in (torch.conv1d, torch.conv2d, torch.conv3d)
}


@contextmanager
def fast_kernels(*, second_order: bool = True) -> Iterator[None]:
    """Runs convolutions and max pooling inside the ``with`` block by quicker CPU kernels.

    The values and all derivatives are those of torch, from layers and from functions alike:

    - max pooling of images takes torch's kernel for channels_last, also in the default layout;
    - convolutions have a double backward made of the kernels of training.

    :func:`task_batch_loss` and the adapters' ``innerloop_ctx`` do this by themselves; a loop in
    plain ``torch.func`` gains by it. On other devices, under autocast and in code that
    ``torch.compile`` traces, torch's own functions are left alone.

    Args:
        second_order: whether gradients of gradients will be asked for; if not, convolutions are
            left alone.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.MaxPool2d(2))
        >>> with mpp.fast_kernels():
        ...     net(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5, 8, 13, 13])
    """
    with _FastKernels({**_POOLING, **_CONVOLUTIONS} if second_order else _POOLING):
        yield


class _FastKernels(TorchFunctionMode):
    def __init__(self, replacements: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Called for whatever torch does, the reading of an attribute too: as short as can be.
        replacement = self.replacements.get(func)
        if replacement is not None and not torch.compiler.is_compiling():
            func = replacement
        return func(*args, **kwargs) if kwargs else func(*args)
