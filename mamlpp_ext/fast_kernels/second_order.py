"""Which of torch's kernels have a second derivative, and which lack one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mamlpp_ext.torch_private import (
    DifferentiableWeightNorm,
    has_weight_norm,
    missing_derivatives,
)

# By a word of the operation, what can be differentiated twice in its place.
_FORMS = {
    "hardsigmoid": "F.relu6(x + 3) / 6",
    "embedding_bag": "F.embedding(...).mean(1)",
    "dist_backward": "(a[:, None] - b).square().sum(-1).sqrt()",
    "functions with out=": "another layer (of torch's own, LocalResponseNorm for CrossMapLRN2d)",
    "dot_product": "sdpa_kernel(SDPBackend.MATH) inside the forward",
    "weight_norm": "mpp.twice_differentiable(model) around the loop (torch's own is wrong)",
}
# What some of them say themselves (2.13).
_UNKNOWN = (
    r"^the derivative for .* is not implemented|^derivative for .* is not implemented"
    r"|^Trying to differentiate twice a function that was marked with @once_differentiable"
    r"|functions with out=... arguments don't support automatic differentiation"
)


@contextmanager
def twice_differentiable(module: nn.Module, *, second_order: bool = True) -> Iterator[None]:
    """Inside the ``with`` block torch takes kernels that have a second derivative.

    Its fused attention (2.13) and cuDNN's recurrent layers have none. Here
    ``F.scaled_dot_product_attention`` is computed by torch's own ``SDPBackend.MATH``, and recurrent
    layers on a GPU without cuDNN (convolutions of the same model, too); dropout, masks and causal
    attention mean what they mean. ``weight_norm`` is composed of other operations: its kernel
    (2.13), differentiated twice, takes the norm for a constant. The adapters' ``innerloop_ctx`` and
    :func:`task_batch_loss` do this by themselves in second order; a loop of your own does it around
    itself.

    Args:
        module: the model.
        second_order: whether gradients of gradients will be asked for; False changes nothing, so
            that ``da.second_order`` can be passed.

    Raises:
        RuntimeError: if torch has no second derivative of something in it, in other words than its
            own.

    Example:
        >>> import torch
        >>> import mamlpp_ext as mpp
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> with mpp.twice_differentiable(layer):
        ...     loss = layer(torch.randn(4, 5, 8)).square().mean()
        ...     grads = torch.autograd.grad(loss, layer.parameters(), create_graph=True)
        >>> sum(grad.square().sum() for grad in grads).backward()

    Source:
        ``torch.nn.attention.sdpa_kernel`` and ``torch.backends.cudnn.flags``.
    """
    with ExitStack() as stack:
        if second_order:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(_takes_cudnn(layer) for layer in module.modules()):
                stack.enter_context(_without_cudnn())
            if any(has_weight_norm(layer) for layer in module.modules()):
                stack.enter_context(DifferentiableWeightNorm())
        try:
            yield
        except RuntimeError as error:
            if second_order and re.search(_UNKNOWN, str(error)):
                raise _no_second_derivative(str(error).rstrip(".")) from error
            raise


def _takes_cudnn(layer: nn.Module) -> bool:
    return isinstance(layer, nn.RNNBase) and any(p.is_cuda for p in layer.parameters())


def _without_cudnn() -> Any:
    now = torch.backends.cudnn
    return now.flags(False, now.benchmark, now.deterministic, now.allow_tf32)


def check_second_derivatives(grads: Iterable[Tensor | None]) -> None:
    """Says which operations behind these gradients torch cannot differentiate once more.

    Args:
        grads: with their graph.

    Raises:
        RuntimeError: if there are some.
    """
    missing = missing_derivatives(grads)
    if missing:
        raise _no_second_derivative(", ".join(missing))


def _no_second_derivative(said: str) -> RuntimeError:
    forms = [form for word, form in _FORMS.items() if word in said]
    instead = f", or use {' and '.join(forms)} in its place" if forms else ""
    return RuntimeError(
        f"torch has no second derivative of what the model or its loss uses: {said}; train in "
        f"first order (second_order=False){instead}"
    )
