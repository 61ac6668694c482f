"""The surgery: a table in a parameter's place, and who is to read its rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mamlpp_ext.norm.any_layer.reading import Calls, Holder, Reader
from mamlpp_ext.norm.fused_sequential import FusedSequential
from mamlpp_ext.norm.made_class import Made, kind_of, made_class
from mamlpp_ext.norm.tables import Settings, table_of
from mamlpp_ext.torch_private import held, is_batch_norm, keeps_statistics

_LOGGER = logging.getLogger(__name__)
_ATTRIBUTES = (
    "inner_step",
    "num_steps",
    "extra_steps",
    "per_step_names",
    "per_step_calls",
    "per_step_readers",
)


class Owner(NamedTuple):
    """A module and the key of a parameter that it holds.

    Attributes:
        where: both, for messages.
        layer: the module.
        key: the parameter's own name there.
    """

    where: str
    layer: nn.Module
    key: str


def owners(module: nn.Module, names: Iterable[str]) -> list[Owner]:
    """Returns every module that holds a parameter of these names, tied ones all of theirs."""
    every = dict(module.named_parameters())
    wanted = {id(every[name]) for name in names}
    return [
        Owner(f"'{f'{path}.{key}'.lstrip('.')}' of {type(layer).__name__}", layer, key)
        for path, layer in module.named_modules()
        for key, p in held(layer, "parameters").items()
        if id(p) in wanted
    ]


def check_owners(module: nn.Module, names: Iterable[str], settings: Settings) -> None:
    """Says which of the parameters of these names cannot have rows, and why.

    Raises:
        ValueError: if there is one.
    """
    held_by = _holding(module)
    for owner in owners(module, names):
        p = held(owner.layer, "parameters")[owner.key]
        _check_kind(owner, p)
        _check_attributes(owner, settings)
        if not (_has_forward(owner.layer) or _readers(owner.layer, held_by)):
            raise ValueError(
                f"{owner.where} is read by no forward: neither its module nor one around it has "
                "any; convert the model whose forward reads it"
            )
        for path, layer in module.named_modules():
            for attribute, value in vars(layer).items():
                if value is not held(layer, "parameters") and _contains(value, p):
                    raise ValueError(
                        f"{owner.where} stands in the attribute {attribute!r} of "
                        f"'{path or '(root)'}', too, and may be read there, where no row can take "
                        "its place (recurrent layers hold their weights in such a list); leave it "
                        "out of names, or use nn.LSTMCell or nn.GRUCell, which read their own"
                    )


def _check_kind(owner: Owner, p: nn.Parameter) -> None:
    layer, where = owner.layer, owner.where
    if is_lazy(p):
        raise ValueError(f"{where} is lazy and has no shape yet; run the model once, then convert")
    if is_batch_norm(layer) or keeps_statistics(layer):
        raise ValueError(
            f"{where} belongs to running statistics, which need rows, too; use "
            "convert_norm(model, num_steps) first, which gives rows to both"
        )
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError(
            f"{where} is scripted, and what it reads cannot be changed; convert the model before "
            "torch.jit.script"
        )
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
        raise ValueError(
            f"{where} has sparse gradients, which a row cannot hand on; build the layer with "
            "sparse=False"
        )


def _check_attributes(owner: Owner, settings: Settings) -> None:
    layer, where = owner.layer, owner.where
    if isinstance(layer, Holder):
        if (layer.num_steps, layer.extra_steps) != settings[:2]:
            raise ValueError(
                f"{where} is beside parameters that have rows already, with "
                f"num_steps={layer.num_steps} and extra_steps={layer.extra_steps!r}; pass the same"
            )
        return
    taken = [name for name in _ATTRIBUTES if hasattr(layer, name)]
    if taken:
        raise ValueError(
            f"{where} cannot have rows, as its module has an attribute {taken[0]!r} of its own; "
            "rename that, or put the parameter in a module of its own"
        )


def give_rows(module: nn.Module, names: Iterable[str], settings: Settings) -> None:
    """Puts a table in the place of each parameter of these names, in ``module`` itself."""
    every, held_by = dict(module.named_parameters()), _holding(module)
    chosen = owners(module, names)
    tables: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name in names:
        p = every[name]
        table = table_of(p, settings.num_steps)
        tables[id(p)] = nn.Parameter(table, p.requires_grad)
        _LOGGER.info("%s -> %s", name, tuple(table.shape))
    for _, layer, key in chosen:
        own = held(layer, "parameters")
        own[key] = tables[id(own[key])]
        if not isinstance(layer, Holder):
            about = {**settings._asdict(), "per_step_names": (), "per_step_readers": ()}
            vars(layer).update(about)
            _become(layer, Holder)
            _let_read(layer, layer)  # type: ignore[arg-type]
        layer.per_step_names += (key,)  # type: ignore[operator]
    for layer in {id(owner.layer): owner.layer for owner in chosen}.values():
        for reader in _readers(layer, held_by):
            _let_read(reader, layer)  # type: ignore[arg-type]


def _become(layer: Any, mixin: type[Reader]) -> None:
    if not isinstance(layer, Reader):
        layer.per_step_calls = Calls()
    if not isinstance(layer, mixin):
        layer.__class__ = made_class(mixin, kind_of(layer))


def _let_read(reader: Any, holder: Holder) -> None:
    _become(reader, Reader)
    if not any(calls is reader.per_step_calls for calls in holder.per_step_readers):
        holder.per_step_readers += (reader.per_step_calls,)


def _readers(layer: nn.Module, held_by: dict[int, list[nn.Module]]) -> list[nn.Module]:
    """Returns the modules around ``layer`` whose forward may read its parameters by itself.

    The nearest ones that have a forward: ``nn.MultiheadAttention`` reads those of its ``out_proj``,
    Swin those of its linear layers, a ParameterList has no forward to read its own. The fast path
    of encoder layers reads all that is in them.
    """
    found: dict[int, nn.Module] = {}
    around = [(parent, True) for parent in held_by.get(id(layer), ())]
    seen: set[tuple[int, bool]] = set()
    while around:
        parent, nearest = around.pop()
        if (id(parent), nearest) in seen:
            continue
        seen.add((id(parent), nearest))
        reads = nearest or isinstance(parent, nn.TransformerEncoderLayer)
        if reads and _has_forward(parent) and not _only_calls(parent):
            found[id(parent)] = parent
        nearest = nearest and not _has_forward(parent)
        around += [(further, nearest) for further in held_by.get(id(parent), ())]
    return list(found.values())


def _holding(module: nn.Module) -> dict[int, list[nn.Module]]:
    """Returns the modules that hold each module."""
    held_by: dict[int, list[nn.Module]] = {}
    for parent in module.modules():
        for child in parent.children():
            held_by.setdefault(id(child), []).append(parent)
    return held_by


def _has_forward(layer: nn.Module) -> bool:
    return kind_of(layer).forward is not nn.Module.forward


def _only_calls(layer: nn.Module) -> bool:
    """Returns whether its forward is known to read no parameters of what it holds."""
    sequential = kind_of(layer).forward in (nn.Sequential.forward, FusedSequential.forward)
    return sequential or (isinstance(layer, Made) and not isinstance(layer, Reader))


def _contains(value: Any, p: nn.Parameter) -> bool:
    return any(each is p for each in _each(value))


def _each(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
