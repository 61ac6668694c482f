"""Operators without documentation, and what is known of a graph of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Without an underscore, but in no documentation either.
_OPERATORS = (
    "batch_norm_update_stats",
    "convolution",
    "convolution_backward",
    "leaky_relu_backward",
    "max_pool2d_with_indices",
    "native_batch_norm",
    "native_batch_norm_backward",
    "threshold_backward",
)
_NEVER = itertools.count(-1, -1)

# Nodes that look as others do and raise when they are called (2.13), or whose backward is not what
# it says: that of weight_norm takes its norm for a constant.
_RAISE = {
    "CdistBackwardBackward": "aten::_cdist_backward",
    "EmbeddingBagBackwardBackward": "aten::_embedding_bag_backward",
    "PdistBackwardBackward": "aten::_pdist_backward",
    "WeightNormInterfaceBackward": "aten::_weight_norm_interface",
}


@cache
def has_operators() -> bool:
    """Returns whether the operators that the closed forms are made of are there."""
    return all(hasattr(torch.ops.aten, name) for name in _OPERATORS)


def subtract_products(
    params: Sequence[Tensor], grads: Sequence[Tensor], rates: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Returns each parameter less its rate times its gradient; missing: one after the other."""
    at_once = getattr(torch, "_foreach_addcmul", None)
    if at_once is not None:
        return at_once(params, grads, rates, value=-1)  # type: ignore[no-any-return]
    triples = zip(params, grads, rates, strict=True)
    return [torch.addcmul(param, grad, rate, value=-1) for param, grad, rate in triples]


def missing_derivatives(grads: Iterable[Tensor | None]) -> list[str]:
    """Returns the operations in the graph of these gradients that torch has no derivative of.

    Missing, as the name of such nodes is torch's own: none; their backward then says so.
    """
    return sorted({_said_by(node) for node in _graph(grads) if _raises(node.name())})


def graph_names(tensor: Tensor) -> set[str]:
    """Returns what torch calls the functions behind a tensor."""
    return {node.name() for node in _graph([tensor])}


def graph_leaves(tensors: Iterable[Tensor], before: Iterable[Tensor] = ()) -> set[int]:
    """Returns the ids of the leaves that a backward of these would reach; missing: none.

    Args:
        tensors: where it begins.
        before: tensors that it does not pass.
    """
    variables = (getattr(node, "variable", None) for node in _graph(tensors, before))
    return {id(variable) for variable in variables if variable is not None}


def _graph(tensors: Iterable[Tensor | None], before: Iterable[Tensor] = ()) -> Iterator[Any]:
    seen: set[Any] = {tensor.grad_fn for tensor in before}
    stack: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions if following is not None]
            yield node


def _raises(name: str) -> bool:
    return "NotImplemented" in name or name.rstrip("0123456789") in _RAISE


def _said_by(node: Any) -> str:
    """Returns what a node says for which there is no derivative."""
    if known := _RAISE.get(node.name().rstrip("0123456789")):
        return known
    for count in range(1, 16):  # of gradients that it takes
        try:
            node(*[None] * count)
        except TypeError:
            continue
        except RuntimeError as error:
            return str(error).removesuffix(" is not implemented").removeprefix("derivative for ")
    return str(node.name())


def changes_of(tensor: Tensor) -> int:
    """Returns how often it was written to; missing: another number each time, as if just now.

    Tensors of inference mode count nothing, and can be written to there alone: 0.
    """
    try:
        return int(getattr(tensor, "_version", next(_NEVER)))
    except RuntimeError:
        return 0


def forget_workspaces() -> None:
    """Lets torch make new workspaces of its CUDA libraries for each stream; missing: does nothing.

    It keeps one for every stream, 67 MB. A CUDA graph is to have its own, in its own memory: one
    that it shared with another graph would be gone with that.
    """
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is not None:
        forget()
