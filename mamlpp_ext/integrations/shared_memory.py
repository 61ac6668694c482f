"""Tensors that share memory with buffers: kept together in higher's copies, refused in objects.

higher clones each buffer alone: of a table and a buffer that is a row of it, the copies would part,
and an attribute that is a view of a buffer would stay with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.norm import MOST, all_in
from mamlpp_ext.torch_private import changes_of, held, plain_names

Pairs = list[tuple[nn.Module, nn.Module]]
_Place = tuple[torch.device, int]
_CONTAINERS = (list, tuple, set, frozenset, dict)  # in which references are followed
_NO_TENSORS = frozenset((type(None), bool, int, float, str, type))


def keep_memory_shared(pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """Lets the copies of buffers share memory where the buffers do.

    Args:
        pairs: each module of the model, and its twin.

    Returns:
        Each tensor that shares memory with a buffer and stands in an attribute, or in a container
        there, with what stands for it beside the copies.
    """
    sharing: dict[_Place | None, dict[int, Tensor]] = {}
    for buffer, _ in _buffers(pairs):
        if (place := _place(buffer)) is not None:
            sharing.setdefault(place, {})[id(buffer)] = buffer
    kept: dict[int, Tensor] = {}
    for module, _ in pairs if sharing else ():
        for tensor in _in_containers(_plain(module)):
            tensors = sharing.get(_place(tensor))
            if tensors is not None and id(tensor) not in tensors:
                tensors[id(tensor)] = kept[id(tensor)] = tensor
    copies: dict[int, Tensor] = {}
    for tensors in sharing.values():
        if len(tensors) > 1:
            copies.update(_copies(tensors))
    for module, twin in pairs if copies else ():
        own, theirs = held(module, "buffers"), held(twin, "buffers")
        theirs.update({name: copies[id(b)] for name, b in own.items() if id(b) in copies})
    return [(tensor, copies[i]) for i, tensor in kept.items()]


class HeldByObjects:
    """Buffers that objects hold, where no copy can be put: found once a forward has changed them.

    Args:
        pairs: each module of the model, and its twin.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._modules = [module for module, _ in pairs]
        self._seen = [
            (_place(buffer), [(tensor, changes_of(tensor)) for tensor in (buffer, copy)])
            for buffer, copy in _buffers(pairs)
        ]

    def refuse_changed(self) -> None:
        """Finds buffers that the forward changed and that an object holds, too.

        Raises:
            RuntimeError: if there are any.
        """
        changed = {
            place
            for place, counted in self._seen
            if any(changes_of(tensor) != count for tensor, count in counted)
        }
        for module in self._modules if changed else ():
            own = _plain(module)
            followed = {id(tensor) for tensor in _in_containers(own)}
            for name, value in own.items():
                for thing in all_in(value):
                    if (
                        isinstance(thing, Tensor)
                        and id(thing) not in followed
                        and _place(thing) in changed - {None}
                    ):
                        raise _held(module, name)


def _held(module: nn.Module, name: str) -> RuntimeError:
    return RuntimeError(
        f"the forward changes a buffer that an object in the attribute '{name}' of this "
        f"{type(module).__name__} refers to, too, where the patched model's copy of the buffer "
        "cannot be put; keep the tensor itself in the attribute, or use "
        "mamlpp_ext.integrations.torchopt or task_batch_loss, which patch nothing"
    )


def _buffers(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every buffer and its copy."""
    for module, twin in pairs:
        theirs = held(twin, "buffers")
        for name, buffer in held(module, "buffers").items():
            if buffer is not None:
                yield buffer, theirs[name]


def _plain(module: nn.Module) -> dict[str, Any]:
    """Returns those attributes of a module that may hold tensors."""
    own = vars(module)
    return {n: own[n] for n in plain_names(own) if type(own[n]) not in _NO_TENSORS}


def _in_containers(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in a container, however deep, where references are followed."""
    stack, seen = [value], set[int]()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _CONTAINERS) and id(value) not in seen and len(value) <= MOST:
            seen.add(id(value))
            stack += value.values() if isinstance(value, dict) else value


def _place(tensor: Tensor) -> _Place | None:
    """Returns where a tensor's memory begins; None of one that has no plain memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


@torch.no_grad()
def _copies(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
    """Returns copies of tensors that share memory, by their ids, which share theirs."""
    first = next(iter(tensors.values()))
    every_byte = torch.empty(0, dtype=torch.uint8, device=first.device)
    storage = every_byte.set_(first.untyped_storage()).clone().untyped_storage()
    return {
        i: torch.empty(0, dtype=t.dtype, device=t.device).set_(
            storage, t.storage_offset(), t.shape, t.stride()
        )
        for i, t in tensors.items()
    }
