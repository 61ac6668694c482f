"""Tensors that share memory with buffers: kept together in higher's copies, refused in objects.

higher clones each buffer alone: of a table and a buffer that is a row of it, the copies would part,
and an attribute that is a view of a buffer would stay with the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.norm import MOST, parts_looked_into, parts_of
from mamlpp_ext.torch_private import changes_of, held, hooks_of, plain_names

Pairs = list[tuple[nn.Module, nn.Module]]
_Place = tuple[torch.device, int]
_NO_TENSORS = frozenset((type(None), bool, int, float, str, type))


class SharedMemory:
    """What shares memory with the buffers of a model; their copies share theirs from now on.

    Args:
        pairs: each module of the model, and its twin.

    Attributes:
        kept: each tensor that does and stands in an attribute, or in a container there, with what
            stands for it beside the copies.
    """

    def __init__(self, pairs: Pairs) -> None:
        sharing: dict[_Place | None, dict[int, Tensor]] = {}
        for buffer, _ in _buffers(pairs):
            if (place := _place(buffer)) is not None:
                sharing.setdefault(place, {})[id(buffer)] = buffer
        kept: dict[int, Tensor] = {}
        self._holders: dict[_Place | None, tuple[nn.Module, str]] = {}
        for module, _ in pairs if sharing else ():
            for name, tensor, is_followed in _tensors_of(module):
                place = _place(tensor)
                if place in sharing and not is_followed:
                    self._holders[place] = module, name
                elif place in sharing and id(tensor) not in sharing[place]:
                    sharing[place][id(tensor)] = kept[id(tensor)] = tensor
        copies = _replace(pairs, [tensors for tensors in sharing.values() if len(tensors) > 1])
        self.kept = [(tensor, copies[i]) for i, tensor in kept.items()]
        self._seen = [
            (_place(buffer), tensor, changes_of(tensor))
            for buffer, copy in (_buffers(pairs) if self._holders else ())
            for tensor in (buffer, copy)
        ]

    def refuse_changed(self) -> None:
        """Finds buffers that the forward changed and that an object holds, where no copy can be.

        Raises:
            RuntimeError: if there are any.
        """
        for place, tensor, count in self._seen:
            if place in self._holders and changes_of(tensor) != count:
                raise _held(*self._holders[place])


def _replace(pairs: Pairs, sharing: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Puts copies that share memory in the place of the twins' buffers; returns them, by id."""
    copies: dict[int, Tensor] = {}
    for tensors in sharing:
        copies.update(_copies(tensors))
    for module, twin in pairs if copies else ():
        own, theirs = held(module, "buffers"), held(twin, "buffers")
        theirs.update({name: copies[id(b)] for name, b in own.items() if id(b) in copies})
    return copies


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


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yields what tensors attributes and hooks hold, and whether references are followed."""
    own = vars(module)
    stack: list[tuple[str, Any, bool]] = [(name, own[name], True) for name in plain_names(own)]
    stack += [(name, hooks, True) for name, hooks in hooks_of(module).items() if hooks]
    seen = set[int]()
    while stack:
        name, value, is_followed = stack.pop()
        if isinstance(value, Tensor):
            yield name, value, is_followed
        elif type(value) not in _NO_TENSORS and id(value) not in seen:
            seen.add(id(value))
            parts = parts_looked_into(value) if is_followed else None
            is_followed = parts is not None
            parts = parts_of(value, callables=True) if parts is None else parts
            if parts and len(parts) <= MOST:
                stack += [(name, part, is_followed) for part in parts]


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
