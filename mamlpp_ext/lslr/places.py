"""Where the tensors of a model stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from mamlpp_ext.checks import listing
from mamlpp_ext.torch_private import held

# A dict that a module holds, and a key in it.
Spot = tuple[dict[str, Any], str]


class Place(NamedTuple):
    """Where a tensor of a model stands.

    Attributes:
        path: of the place, from the model.
        name: under which the tensor was asked for.
        spot: the dict that a module holds, and the key there.
    """

    path: str
    name: str
    spot: Spot


def places_of(module: nn.Module, names: Iterable[str]) -> list[Place]:
    """Returns every place in ``module`` of the tensors of these names.

    Raises:
        KeyError: if a name is none of the model's.
        TypeError: if the model is a DataParallel.
        ValueError: if two are of the same tensor.
    """
    if isinstance(module, nn.DataParallel):
        raise TypeError(
            "DataParallel copies its own weights to every device, so that it cannot be called with "
            "others; pass the model in it, its .module (for several devices there is "
            "DistributedDataParallel around TaskBatchLoss)"
        )
    found = _tensors_of(module)
    by_tensor = _asked_for(module, names, found)
    every = ((path, by_tensor.get(id(own[key])), (own, key)) for path, (own, key) in found.items())
    return [Place(path, name, spot) for path, name, spot in every if name is not None]


def _tensors_of(module: nn.Module) -> dict[str, Spot]:
    """Returns where each tensor stands, by its path; that of a layer by its first name alone.

    Written out, as ``named_modules`` takes three times as long.
    """
    found: dict[str, Spot] = {}
    pending, seen = [("", module)], set[int]()
    while pending:
        prefix, layer = pending.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        for own in (held(layer, "parameters"), held(layer, "buffers")):
            found |= {prefix + key: (own, key) for key, t in own.items() if t is not None}
        inner = [*held(layer, "modules").items()]
        pending += [(f"{prefix}{name}.", child) for name, child in inner[::-1] if child is not None]
    return found


def _asked_for(
    module: nn.Module, names: Iterable[str], found: Mapping[str, Spot]
) -> dict[int, str]:
    """Returns the name under which each tensor was asked for, by the tensor's id."""
    by_tensor: dict[int, str] = {}
    unknown, twice = [], []
    for name in dict.fromkeys(names):
        spots = [found[name]] if name in found else spots_of(module, [name])
        if not spots:
            unknown.append(name)
            continue
        [(own, key)] = spots
        other = by_tensor.setdefault(id(own[key]), name)
        if other != name:
            twice.append((other, name))
    if unknown:
        raise KeyError(
            f"{type(module).__name__} has no {listing(unknown)} (it has {listing(list(found))}); "
            "pass weights by their names in named_parameters()"
        )
    for other, name in twice:
        raise ValueError(
            f"'{other}' and '{name}' are one tensor of {type(module).__name__}, which cannot "
            "be two; pass it under one of the names, as dict(module.named_parameters()) does"
        )
    return by_tensor


def spots_of(module: nn.Module, places: Iterable[str]) -> list[Spot] | None:
    """Returns where the places are; None if a module does not hold one of them."""
    layers: dict[str, nn.Module | None] = {"": module}
    found = []
    for place in places:
        path, _, key = place.rpartition(".")
        if path not in layers:
            layers[path] = _layer_at(module, path)
        layer = layers[path]
        holds = () if layer is None else (held(layer, "parameters"), held(layer, "buffers"))
        # Without .get(), which scripted layers' do not have.
        own = next((own for own in holds if key in own and own[key] is not None), None)
        if own is None:
            return None
        found.append((own, key))
    return found


def _layer_at(module: nn.Module, path: str) -> nn.Module | None:
    layer: nn.Module | None = module
    for name in path.split("."):
        layer = None if layer is None else dict(held(layer, "modules").items()).get(name)
    return layer
