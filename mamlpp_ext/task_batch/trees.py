"""Inputs, labels and outputs that are tensors, or tuples, dicts and dataclasses of such."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mamlpp_ext.torch_private import flatten_tree

# What a tree may hold beside tensors; other objects may hold tensors of a vmap that has ended.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Tree(NamedTuple):
    """A tree, taken apart.

    Attributes:
        tensors: its tensors, in order.
        names: where each of them is in it, e.g. ``['mask']``; empty for a tensor alone.
        rebuild: makes the tree again, of other tensors.
        others: what it holds beside tensors.
    """

    tensors: list[Tensor]
    names: list[str]
    rebuild: Callable[[Sequence[Any]], Any]
    others: list[Any]


def taken_apart(tree: Any, *, outputs: bool = False) -> Tree:
    """Takes a tree apart.

    Args:
        tree: a tensor, or what ``torch.utils._pytree`` knows, or a dataclass, to any depth.
        outputs: whether it is what a model returned: of leaves that are neither tensors nor plain
            numbers and words, such as a cache, None is left.
    """
    if isinstance(tree, Tensor):
        return Tree([tree], [""], lambda tensors: tensors[0], [])
    leaves, names, rebuild = _flattened(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    kept = [leaf if isinstance(leaf, _PLAIN) or not outputs else None for leaf in leaves]
    others = [leaf for place, leaf in enumerate(kept) if place not in places]

    def rebuilt(tensors: Sequence[Any]) -> Any:
        found = list(kept)
        for place, tensor in zip(places, tensors, strict=True):
            found[place] = tensor
        return rebuild(found)

    tensors, paths = [leaves[place] for place in places], [names[place] for place in places]
    return Tree(tensors, paths, rebuilt, others)


def _flattened(tree: Any) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Any]]:
    """Returns the leaves, where they are, and what makes the tree again of others."""
    nodes, names, rebuild = flatten_tree(tree)
    # To torch a dataclass that it was not told of is a leaf.
    inner = [_flattened_dataclass(node) for node in nodes]
    leaves = [leaf for found, _, _ in inner for leaf in found]
    paths = [name + path for name, (_, some, _) in zip(names, inner, strict=True) for path in some]

    def rebuilt(found: Sequence[Any]) -> Any:
        rest = iter(found)
        return rebuild([make([next(rest) for _ in some]) for some, _, make in inner])

    return leaves, paths, rebuilt


def _flattened_dataclass(
    node: Any,
) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Any]]:
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return [node], [""], lambda found: found[0]
    instance: Any = node
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(instance) if f.init}
    leaves, names, rebuild = _flattened(fields)
    return leaves, names, lambda found: dataclasses.replace(instance, **rebuild(found))
