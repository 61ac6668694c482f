"""Quicker ways to compute what some of torch's layers compute, while a model is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mamlpp_ext.convolution import convolution
from mamlpp_ext.max_pool import max_pool2d


def _replacements(second_order: bool) -> dict[Any, Callable[..., Any]]:
    convolutions = enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1)
    return {
        **{f: partial(max_pool2d, f) for f in (torch.max_pool2d, F.max_pool2d)},
        **{f: partial(convolution, f, count, second_order) for count, f in convolutions},
    }


# By whether gradients of gradients will be asked for.
_REPLACEMENTS = {second_order: _replacements(second_order) for second_order in (False, True)}

# Values of the inputs that a model is called with; below, Python takes longer than is saved.
_WORTH_A_MODE = 10_000


def worth_it(*inputs: Any) -> bool:
    """Returns whether a model called with ``inputs`` gains by :class:`FastKernels`."""
    values = sum(x.numel() for x in inputs if isinstance(x, torch.Tensor))
    return values >= _WORTH_A_MODE and not torch.compiler.is_compiling()


class FastKernels(TorchFunctionMode):
    """Inside the ``with`` block, torch's functions are replaced by the quicker ones.

    A mode sees the functions that a forward calls by itself, too (``F.max_pool2d``), and changes
    no module. It is called for whatever torch does, the reading of an attribute too, 1 us each: so
    it is on while a model is called, not during the whole inner loop.
    """

    def __init__(self, second_order: bool) -> None:
        super().__init__()
        self.replacements = _REPLACEMENTS[bool(second_order)]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the replacement of ``func``, or ``func``."""
        if not torch.compiler.is_compiling():
            func = self.replacements.get(func, func)
        return func(*args, **kwargs) if kwargs else func(*args)


class _Hooks:
    """Turns the mode on when a module's call begins and off when it ends.

    Hooks, and not a ``forward`` of the instance: ``higher`` copies what a module holds, and the
    copy would call the original. torch does not call them where KeyboardInterrupt ends the module's
    call: then the mode stays on up to the end of the block.
    """

    def __init__(self, second_order: bool, is_open: bool = True) -> None:
        self.second_order, self.open = second_order, is_open
        self.local = threading.local()  # as torch's own stack of modes

    @property
    def entered(self) -> list[Any]:
        """This thread's calls of the module, each with its mode or None."""
        entered: list[Any] = self.local.__dict__.setdefault("entered", [])
        return entered

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        return self  # a copy of the module made inside the block is not left with open hooks

    def __reduce__(self) -> Any:
        return _Hooks, (self.second_order, False)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode: Any = None
        if self.open and worth_it(*args, *kwargs.values()):
            mode = FastKernels(self.second_order)
            mode.__enter__()
        self.entered.append(mode)

    def end(self, *_: Any) -> None:
        mode = self.entered.pop() if self.entered else None  # where a hook failed before `begin`
        if mode is not None:
            mode.__exit__(None, None, None)


@contextmanager
def fast_kernels(module: nn.Module, *, second_order: bool = True) -> Iterator[None]:
    """Lets calls of ``module`` inside the ``with`` block take quicker CPU kernels.

    The values and all derivatives are torch's own, for layers and for functions alike:

    - max pooling of images takes torch's kernel for channels_last, also in the default layout;
    - convolutions have a double backward made of the kernels of training, and under ``vmap`` add
      their bias themselves.

    :func:`task_batch_loss` and the adapters' ``innerloop_ctx`` do this by themselves; a loop in
    plain ``torch.func`` gains by it. Small inputs, other devices, autocast and code that
    ``torch.compile`` traces are left to torch's own functions.

    Args:
        module: the model, to which it adds hooks for the time of the block.
        second_order: whether gradients of gradients will be asked for; a matter of speed alone.

    Raises:
        TypeError: if ``module`` is not a module.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.MaxPool2d(2))
        >>> with mpp.fast_kernels(net):
        ...     net(torch.randn(5, 1, 28, 28)).shape
        torch.Size([5, 8, 13, 13])

    Source:
        The derivatives of torch's own layers; what is gained is in ``benchmarks/README.md``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"fast_kernels takes the model, a torch.nn.Module, got {type(module).__name__}; pass "
            "the model that the inner loop calls"
        )
    hooks = _Hooks(second_order)
    handles = [
        module.register_forward_pre_hook(hooks.begin, prepend=True, with_kwargs=True),
        module.register_forward_hook(hooks.end, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        hooks.open = False
        while hooks.entered:  # of a call that KeyboardInterrupt ended
            hooks.end()
