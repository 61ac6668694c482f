"""Trees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mamlpp_ext.torch_private.imported import imported

_pytree = imported("torch.utils._pytree")


def flatten_tree(tree: Any) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Any]]:
    """Returns the leaves of a tree, where each is in it (``['a'][0]``), and what makes it again.

    Missing: only tuples, lists and dicts are taken apart, not what was registered with torch.
    """
    parts = ("tree_flatten_with_path", "tree_unflatten", "keystr")
    if _pytree is None or not all(hasattr(_pytree, name) for name in parts):
        return _flattened(tree, "")
    pairs, spec = _pytree.tree_flatten_with_path(tree)
    names = [_pytree.keystr(path) for path, _ in pairs]
    return [leaf for _, leaf in pairs], names, lambda leaves: _pytree.tree_unflatten(leaves, spec)


def _flattened(tree: Any, name: str) -> tuple[list[Any], list[str], Any]:
    if type(tree) not in (tuple, list, dict):
        return [tree], [name], lambda leaves: leaves[0]
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    inner = [_flattened(tree[key], f"{name}[{key!r}]") for key in keys]

    def rebuild(leaves: Sequence[Any]) -> Any:
        rest = iter(leaves)
        made = [make([next(rest) for _ in found]) for found, _, make in inner]
        return dict(zip(keys, made, strict=True)) if isinstance(tree, dict) else type(tree)(made)

    leaves = [leaf for found, _, _ in inner for leaf in found]
    return leaves, [path for _, paths, _ in inner for path in paths], rebuild
