"""Finds where a patched model of higher goes by the model's own weights, which nobody adapts.

What it touches of higher: the patched model's ``_fast_params``, all that it has had so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from mamlpp_ext.checks import listing
from mamlpp_ext.norm import all_in
from mamlpp_ext.torch_private import graph_leaves


def refuse_unpatched(fnet: Any, adapted: Mapping[str, Tensor]) -> None:
    """Lets each call of a patched model look whether its output depends on weights of the model.

    As when a layer is called by an object that holds it, where nothing can put its twin. What
    depends on them by the inputs or by what the model was given to keep, or is added to the loss
    outside of the model, may.

    Args:
        fnet: what higher made of a model.
        adapted: by name, the parameters of the model that are adapted.
    """
    patched: Any = type(fnet)
    call, names = patched.__call__, {id(p): name for name, p in adapted.items()}

    def reached(tensors: Iterable[Tensor], before: Iterable[Tensor]) -> list[str]:
        leaves = graph_leaves(tensors, before)
        return [name for i, name in names.items() if i in leaves]

    def call_and_look(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        every = self._fast_params or [[]]
        if reached(_tensors(output), every[-1]):  # which is little to look through
            inputs = [*_tensors((args, kwargs))]
            kept = [t for module in self.modules() for t in _tensors(vars(module))]
            given = {names.get(id(t)) for t in inputs}
            before = [*inputs, *kept, *(p for params in every for p in params)]
            if found := [name for name in reached(_tensors(output), before) if name not in given]:
                raise _goes_by(found, "output of the patched model")
        return output

    patched.__call__ = call_and_look


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
