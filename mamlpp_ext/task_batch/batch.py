"""The tasks of a meta-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_ext.task_batch.trees import Tree, taken_apart

# Support inputs and labels, target inputs and labels: tensors [T, examples, ...], or trees of such.
Batch = tuple[Any, Any, Any, Any]
Rebuild = Callable[[Sequence[Any]], Any]

_NAMES = ("x_support", "y_support", "x_target", "y_target")
_SHAPES = "[T, S, ...], [T, S, ...], [T, Q, ...], [T, Q, ...]"


class Examples(NamedTuple):
    """Inputs and labels, of all tasks or of one.

    Attributes:
        tensors: of the inputs, then of the labels.
        inputs: how many are of the inputs.
        rebuild: what makes inputs and labels again of tensors.
        structure: what else they are made of, to be compared.
    """

    tensors: list[Tensor]
    inputs: int
    rebuild: tuple[Rebuild, Rebuild]
    structure: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Tree, labels: Tree) -> Examples:
        """Puts inputs and labels together."""
        tensors = [*inputs.tensors, *labels.tensors]
        structure = (inputs.names, inputs.others, labels.names, labels.others)
        return cls(tensors, len(inputs.tensors), (inputs.rebuild, labels.rebuild), structure)

    def made_of(self, tensors: Sequence[Any]) -> tuple[Any, Any]:
        """Returns inputs and labels made of other tensors."""
        first, second = self.rebuild
        return first(tensors[: self.inputs]), second(tensors[self.inputs :])


class Tasks(NamedTuple):
    """Some tasks of a meta-batch.

    Attributes:
        support: to adapt by; tensors [T, S, ...].
        target: to measure by; tensors [T, Q, ...].
    """

    support: Examples
    target: Examples

    def __len__(self) -> int:
        """Returns T, the number of tasks."""
        return len(self.support.tensors[0])

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the tasks."""
        return [*self.support.tensors, *self.target.tensors]

    def in_chunks(self, size: int) -> Iterator[Tasks]:
        """Yields the tasks, ``size`` at once."""
        parts = zip(*(torch.split(t, size) for t in self.tensors), strict=True)
        return map(self.of, parts)

    def single(self) -> Tasks:
        """Returns the first task, without the dimension T."""
        return self.of([t[0] for t in self.tensors])

    def batch(self) -> Batch:
        """Returns the parts as they were given."""
        support, target = (examples.made_of(examples.tensors) for examples in self)
        return *support, *target

    def of(self, tensors: Sequence[Tensor]) -> Tasks:
        """Returns tasks of the same structure, made of other tensors."""
        count = len(self.support.tensors)
        parts = list(tensors[:count]), list(tensors[count:])
        return Tasks(*(e._replace(tensors=p) for e, p in zip(self, parts, strict=True)))


def checked_batch(batch: Batch) -> Tasks:
    """Returns the tasks if the parts agree.

    Raises:
        ValueError: if they do not, or hold no tensors of tasks.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != len(_NAMES):
        raise ValueError(
            f"batch must be {_NAMES} of shapes {_SHAPES}, got {_shapes(batch)}; stack the tasks "
            "along a new dimension 0; several inputs of a model go into one part, as a tuple for "
            "model(*x) or a dict for model(**x)"
        )
    trees = [taken_apart(part) for part in batch]
    alone = all(isinstance(part, Tensor) for part in batch)
    for name, tree in zip(_NAMES, trees, strict=True):
        _check_part(batch, name, tree, least=2 if alone else 1)
    if alone:
        _check_examples({n: tuple(t.shape[:2]) for n, t in zip(_NAMES, batch, strict=True)})
    sizes = {
        name + path: len(tensor)
        for name, tree in zip(_NAMES, trees, strict=True)
        for path, tensor in zip(tree.names, tree.tensors, strict=True)
    }
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(
            "every tensor of batch must have the tasks in dimension 0, at least one and as many as "
            f"the others; got {sizes}"
        )
    x_support, y_support, x_target, y_target = trees
    return Tasks(Examples.of(x_support, y_support), Examples.of(x_target, y_target))


def _check_part(batch: Batch, name: str, tree: Tree, least: int) -> None:
    if not tree.tensors or any(tensor.dim() < least for tensor in tree.tensors):
        raise ValueError(
            f"batch must be {_NAMES} of shapes {_SHAPES}, got {_shapes(batch)}; stack the tasks of "
            f"{name} along a new dimension 0"
        )


def _shapes(batch: Any) -> Any:
    """Returns what the parts are, in words."""
    if not isinstance(batch, (tuple, list)):
        return type(batch).__name__
    return [tuple(p.shape) if isinstance(p, Tensor) else _in_words(p) for p in batch]


def _in_words(part: Any) -> Any:
    tree = taken_apart(part)
    shapes = [tuple(tensor.shape) for tensor in tree.tensors]
    return f"{type(part).__name__} of {shapes}" if shapes else type(part).__name__


def _check_examples(shapes: dict[str, tuple[int, ...]]) -> None:
    x_support, y_support, x_target, y_target = shapes.values()
    if x_support != y_support or x_target != y_target or x_support[0] != x_target[0]:
        raise ValueError(
            "the parts of batch must agree in T, inputs and labels also in their number of "
            f"examples; got [T, examples] {shapes}"
        )
    if 0 in x_support or 0 in x_target:
        raise ValueError(
            "batch must hold at least one task with at least one example in each part, got "
            f"[T, examples] {shapes}"
        )
