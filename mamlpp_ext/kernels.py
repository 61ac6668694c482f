"""Quicker ways to compute what some of torch's layers compute, while a model is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mamlpp_ext.convolution import convolution
from mamlpp_ext.known_gradients import KnownGradients
from mamlpp_ext.layout import Views, in_default_layout
from mamlpp_ext.max_pool import max_pool2d
from mamlpp_ext.quick_function import transforms_active

_VIEWS = (Tensor.view, Tensor.view_as)
_POOLING = (torch.max_pool2d, F.max_pool2d)
# These rise with their input (F.leaky_relu: where its slope does), or stay as they are.
_ACTIVATIONS = (torch.relu, Tensor.relu, F.relu, F.leaky_relu)


def _replacements(
    second_order: bool, known: KnownGradients | None
) -> dict[Any, Callable[..., Any]]:
    convolutions = enumerate((torch.conv1d, torch.conv2d, torch.conv3d), start=1)
    return {
        **{f: partial(max_pool2d, f, second_order) for f in _POOLING},
        **{f: partial(convolution, f, count, second_order, known) for count, f in convolutions},
    }


# By whether gradients of gradients will be asked for.
_REPLACEMENTS = {second_order: _replacements(second_order, None) for second_order in (False, True)}

# Values of the inputs that a model is called with; below, Python takes longer than is saved.
_WORTH_A_MODE = 2_500
# Values of an activation's input; below, it and its backwards are quick anyway.
_WORTH_COMMUTING = 200_000


def worth_it(*inputs: Any, within: bool | None = None) -> bool:
    """Returns whether a model called with ``inputs`` gains by :class:`FastKernels`.

    ``within`` says whether that is within a torch.func transform, without which a GPU has no use
    for them; None: as it is now.
    """
    within = transforms_active() if within is None else within
    there = [x for x in inputs if isinstance(x, Tensor) and (x.is_cpu or (within and x.is_cuda))]
    values = sum(x.numel() for x in there)
    return values >= _WORTH_A_MODE and not torch.compiler.is_compiling()


class _Activated(NamedTuple):
    """An activation that was just called: with what, and what it returned."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def may_follow_pooling(self, pooled: Any) -> bool:
        """Returns whether it may be called after the pooling of ``pooled`` instead.

        The greatest value of a window stays the greatest. A quarter of the values are left for it
        and for its backwards. What it returned was computed in vain then, unless others read it.
        """
        x = self.args[0] if self.args else None
        if pooled is not self.output or pooled is x or not isinstance(x, Tensor) or not x.is_cpu:
            return False
        if not (transforms_active() or x.numel() >= _WORTH_COMMUTING):
            return False
        return self.function is not F.leaky_relu or self._slope() >= 0

    def _slope(self) -> Any:
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("negative_slope", 0.01)

    def of(self, x: Tensor) -> Tensor:
        """Calls it with ``x``."""
        return self.function(x, *self.args[1:], **self.kwargs)  # type: ignore[no-any-return]


class FastKernels(TorchFunctionMode):
    """Inside the ``with`` block, torch's functions are replaced by the quicker ones.

    A mode sees the functions that a forward calls by itself, too (``F.max_pool2d``), and changes
    no module. It is called for whatever torch does, the reading of an attribute too, 1 us each: so
    it is on while a model is called, not during the whole inner loop.
    """

    def __init__(self, second_order: bool, known: KnownGradients | None = None) -> None:
        super().__init__()
        order = bool(second_order)
        shared = _REPLACEMENTS[order] if known is None else _replacements(order, known)
        self.views = Views()
        of_views = {f: partial(self.views, f) for f in _VIEWS}
        self.replacements: dict[Any, Callable[..., Any]] = {**shared, **of_views}
        self.activated: _Activated | None = None  # by the very last call

    def __exit__(self, *error: Any) -> None:
        """Leaves the block; what a forward has written to a copy raises."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.views.end()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the replacement of ``func``, or ``func``."""
        before, self.activated = self.activated, None
        kwargs = kwargs or {}
        quick = None if torch.compiler.is_compiling() else self.replacements.get(func)
        if quick is None:
            output = func(*args, **kwargs)
            if func in _ACTIVATIONS:
                self.activated = _Activated(func, args, kwargs, output)
            return output
        if before is not None and func in _POOLING and args and before.may_follow_pooling(args[0]):
            return before.of(quick(before.args[0], *args[1:], **kwargs))
        return quick(*args, **kwargs)


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

    def end(self, module: Any = None, args: Any = (), kw: Any = (), output: Any = None) -> Any:
        mode = self.entered.pop() if self.entered else None  # where a hook failed before `begin`
        if mode is None:
            return None
        mode.__exit__(None, None, None)
        return in_default_layout(output, (args, kw))


@contextmanager
def fast_kernels(module: nn.Module, *, second_order: bool = True) -> Iterator[None]:
    """Lets calls of ``module`` inside the ``with`` block take quicker CPU kernels.

    The values and all derivatives are torch's own but for rounding, for layers and for functions
    alike:

    - convolutions of images return channels_last, in which batch norm and pooling are fastest;
    - convolutions have a double backward made of the kernels of training, and under ``vmap`` add
      their bias themselves;
    - max pooling takes torch's kernel for channels_last, comes before a ReLU, and has derivatives
      that keep no feature map.

    A forward may look at a feature map by ``view`` all the same, though not write through it, and
    images are returned in the layout that they would have without. Gradients of a convolution's
    weight may be channels_last: flatten them by ``reshape``. Where a pooling follows, no gradient
    reaches what the ReLU itself returned (a feature map that you keep to differentiate by).

    :func:`task_batch_loss` and the adapters' ``innerloop_ctx`` do this by themselves; a loop in
    plain ``torch.func`` gains by it. Small inputs, autocast, code that ``torch.compile`` traces and
    other devices (but for convolutions under ``vmap`` on a GPU) are left to torch's own functions.

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
        module.register_forward_hook(hooks.end, with_kwargs=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        hooks.open = False
        while hooks.entered:  # of a call that KeyboardInterrupt ended
            hooks.end()
