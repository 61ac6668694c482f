"""Finds where a patched model of higher goes by the model's own weights, which nobody adapts.

What it touches of higher: the patched model's ``_fast_params``, all that it has had so far.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.norm import all_in
from mamlpp_ext.torch_private import graph_leaves


def refuse_unpatched(fnet: Any, twins: Iterable[nn.Module], adapted: Mapping[str, Tensor]) -> None:
    """Lets each call of a patched model look whether its output depends on weights of the model.

    Of its layers, too, where they are called by themselves. As when a layer is called by an object
    that holds it, where nothing can put its twin. What depends on them by the inputs or by what the
    model was given to keep, or is added to the loss outside of the model, may.

    Args:
        fnet: what higher made of a model.
        twins: it and its layers.
        adapted: by name, the parameters of the model that are adapted.
    """
    looking = _Looking(fnet, {id(p): name for name, p in adapted.items()})
    for twin in twins:
        patched: Any = type(twin)
        patched.__call__ = looking.at(patched.__call__)


class _Looking:
    """Looks at what the outermost of calls within calls returns.

    Args:
        fnet: a patched model, to which its own class will refer by this.
        names: of the weights that nothing may depend on, by their ids.
    """

    def __init__(self, fnet: Any, names: dict[int, str]) -> None:
        self.fnet = weakref.proxy(fnet)
        self.names, self.within = names, False

    def at(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a module's ``__call__`` that looks."""

        def call_and_look(module: Any, *args: Any, **kwargs: Any) -> Any:
            if self.within:
                return call(module, *args, **kwargs)
            self.within = True
            try:
                output = call(module, *args, **kwargs)
            finally:
                self.within = False
            self.look(output, (args, kwargs))
            return output

        return call_and_look

    def look(self, output: Any, given: Any) -> None:
        every = self.fnet._fast_params or [[]]
        if self.reached(output, every[-1]):  # which is little to look through
            inputs = [*_tensors(given)]
            kept = [t for module in self.fnet.modules() for t in _tensors(vars(module))]
            known = {self.names.get(id(t)) for t in inputs}
            before = [*inputs, *kept, *(p for params in every for p in params)]
            if found := [name for name in self.reached(output, before) if name not in known]:
                raise _goes_by(found, "output of the patched model")

    def reached(self, output: Any, before: Iterable[Tensor]) -> list[str]:
        leaves = graph_leaves(_tensors(output), before)
        return [name for i, name in self.names.items() if i in leaves]


def refuse_loss_of_unpatched(loss: Tensor, unadapted: Mapping[str, Tensor]) -> None:
    """Finds weights of the model itself that a loss depends on in the place of the patched ones.

    Args:
        loss: of the support set.
        unadapted: by name, the parameters of the model of which the loss has no gradient in the
            patched model.

    Raises:
        RuntimeError: if there are any.
    """
    reached = graph_leaves([loss])
    if found := [name for name, p in unadapted.items() if id(p) in reached]:
        raise _goes_by(found, "support loss")


def _goes_by(names: list[str], what: str) -> RuntimeError:
    return RuntimeError(
        f"the {what} depends on {listing(names)} of the model itself, not of the patched one that "
        "is adapted: call fnet(x), not net(x); models that call their layers by a reference that "
        "cannot be followed (an object that holds them) are for mamlpp_ext.integrations.torchopt "
        "or task_batch_loss, which patch nothing"
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in an output, in containers and attributes of objects, too."""
    return (thing for thing in all_in(tree) if isinstance(thing, Tensor))
