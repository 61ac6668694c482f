"""What higher's patched twins of modules lack: hooks, one twin for a shared module, references.

higher makes a twin of every module, of a class of its own, and gives it what is in the module's
dictionary as it is. What refers to modules there (a bound method, a wrapped ``forward``, a list of
layers) still means the model itself, whose weights nobody adapts.

What it touches of higher: the patched module's ``update_params`` and ``_refill_params_box``, its
layers' ``_root_ref``, ``_param_names`` and dictionaries (``_parameters``, ``_modules``, hooks), and
that it asks ``_parameters`` for the ``_flat_weights_names`` of recurrent layers.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.integrations.shared_memory import SharedMemory
from mamlpp_ext.lslr import without_hooks
from mamlpp_ext.norm import FusedSequential, References
from mamlpp_ext.torch_private import (
    forget_compiled,
    held,
    hold_parameters,
    hooks_of,
    plain_names,
)


class Twins(NamedTuple):
    """What stands for what in a patched model.

    Attributes:
        pairs: each module of the model, once, and its twin.
        references: what turned references to the model's own into such to the copies.
        back: what turns them back.
        memory: what shares memory with buffers.
    """

    pairs: list[tuple[nn.Module, nn.Module]]
    references: References
    back: References
    memory: SharedMemory


def complete_twins(net: nn.Module, fnet: Any) -> Twins:
    """Gives the patched model what the model has: hooks, shared layers, references to its own.

    Args:
        net: the model.
        fnet: what higher made of it.

    Returns:
        What stands for what in it.

    Raises:
        ValueError: if hooks or functions of the model name a module of it as a global.
    """
    pairs = _paired(net, fnet)
    memory = SharedMemory(pairs)
    copied = [*_copied(pairs), *memory.kept]
    references = References({id(own): copy for own, copy in copied})
    for module, twin in pairs:
        own = vars(twin)
        for name in plain_names(vars(module)) & own.keys():
            own[name] = references.moved(own[name])
        for name, hooks in hooks_of(module).items():
            # Copies: hooks that are registered on the patched model end with it.
            own[name] = OrderedDict((key, references.moved(hook)) for key, hook in hooks.items())
        if twin is not fnet:  # higher tests "if root:", and an emptied nn.Sequential is false
            own["_root_ref"] = weakref.ref(fnet)
        forget_compiled(twin)  # the compiled forward is of the original, and has its weights
        if "_flat_weights_names" in own:
            hold_parameters(twin, _Weights(twin))
        if isinstance(twin, FusedSequential):
            twin.has_current_parameters = True
        _make_originals(type(twin), type(module))
    if references.global_names:
        raise ValueError(
            f"hooks or functions that this {type(net).__name__} holds name a module of it as the "
            f"global {listing(sorted(references.global_names))}, where the patched one cannot be "
            "put; have them take the module that they are called with, or use task_batch_loss or "
            "mamlpp_ext.integrations.torchopt, which patch nothing"
        )
    _keep_parameters_current(type(fnet))
    back = references.reversed({id(copy): own for own, copy in copied})
    return Twins(pairs, references, back, memory)


def _paired(net: nn.Module, fnet: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Returns each module and its twin; what stands in several places gets one twin for all."""
    pairs: dict[int, tuple[nn.Module, nn.Module]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if id(module) in pairs:  # higher patches it once for each of its places
            parent, _, name = path.rpartition(".")
            held(fnet.get_submodule(parent), "modules")[name] = pairs[id(module)][1]
        else:
            pairs[id(module)] = module, fnet.get_submodule(path)
    return list(pairs.values())


def _copied(pairs: list[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[Any, Any]]:
    """Yields what higher has made copies of: modules and buffers, each with its copy."""
    seen = {id(None)}
    for module, twin in pairs:
        yield module, twin
        for name, buffer in held(module, "buffers").items():
            if id(buffer) not in seen:  # of one in several places, the first copy is that of all
                seen.add(id(buffer))
                yield buffer, held(twin, "buffers")[name]


class _Weights(OrderedDict[str, Tensor]):
    """The parameters of a recurrent layer.

    higher looks up here those, too, that a parametrization computes and that are no parameters.
    """

    def __init__(self, twin: nn.Module) -> None:
        super().__init__(held(twin, "parameters"))
        self.twin = weakref.proxy(twin)

    def __missing__(self, name: str) -> Tensor:
        return getattr(self.twin, name)  # type: ignore[no-any-return]


def _make_originals(patched: type[nn.Module], original: type[nn.Module]) -> None:
    """Lets ``self.__class__(...)``, as in a slice of a ``ModuleList``, make the original class.

    higher itself makes its patched classes without arguments.
    """

    def make(cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if args or kwargs else object.__new__(cls)

    patched.__new__ = make  # type: ignore[method-assign, assignment]


def _keep_parameters_current(patched: Any) -> None:
    """Lets layers, their hooks and methods find the parameters in place before they are called.

    higher gives each layer those of ``fnet(x, params=...)`` only as that layer is called, and a
    layer that is called by itself those of the first such call, whatever came after it.
    """
    call, update, refill = patched.__call__, patched.update_params, patched._refill_params_box

    def update_all(self: Any, params: Iterable[Tensor]) -> None:
        try:
            update(self, params)
        except AttributeError as error:
            if "_param_names" not in str(error):
                raise
            raise RuntimeError(
                "the forward has made a layer that the model did not have when it was patched, so "
                "that nobody learns it; call the model once before its rates and its optimizer are "
                "made"
            ) from error
        refill(self, None)

    def refill_all(self: Any, params: Iterable[Tensor] | None) -> None:
        refill(self, None) if params is None else update_all(self, params)

    def call_current(self: Any, *args: Any, params: Any = None, **kwargs: Any) -> Any:
        if params is not None:
            update_all(self, params)
        with without_hooks():
            return call(self, *args, **kwargs)

    patched.__call__, patched.update_params = call_current, update_all
    patched._refill_params_box = refill_all
