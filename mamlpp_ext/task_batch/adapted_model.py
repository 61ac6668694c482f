"""A model that is called with other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.lslr import LSLR, called, checked_lslr, places_of, support_gradients
from mamlpp_ext.steps import BatchStatistics, checked_counters, fixed_at, with_order
from mamlpp_ext.torch_private import held, transforms_active

Params = dict[str, Tensor]


class AdaptedModel:
    """A model, its rates, and which of its tensors the inner loop adapts.

    Args:
        model: the model, holding its parameters.
        lslr: its rates.
        num_steps: how many inner steps its per-step layers must have rows for.

    Attributes:
        initial: what the rates adapt, by name.
        adapting: the names of those that are not frozen.
        counters: of the per-step layers.
        confirm: to be called where it has been found that torch has the second derivatives of all
            that the model does; None if that is known.

    Raises:
        TypeError: if ``lslr`` is no LSLR.
        ValueError: if the rates are another model's or all frozen, or a step is out of range.
    """

    def __init__(self, model: nn.Module, lslr: LSLR, num_steps: int) -> None:
        self.model, self.lslr = model, checked_lslr(lslr)
        self.initial = lslr.parameters_of(model)
        self.adapting = [name for name, p in self.initial.items() if p.requires_grad]
        if not self.adapting:
            raise ValueError(
                f"every parameter that this LSLR adapts ({listing(list(self.initial))}) is frozen; "
                "call requires_grad_(True) on them, or build an LSLR with another adapt"
            )
        self.counters = checked_counters(model, num_steps - 1)
        self.modules = list(model.modules())
        self.confirm: Callable[[], None] | None = None
        self.places = {place.path: place.name for place in places_of(model, self.initial)}
        self.sparse = [
            vars(layer)
            for path, layer in model.named_modules()
            if vars(layer).get("sparse") is True and f"{path}.weight".lstrip(".") in self.places
        ]

    def __call__(self, adapted: Params, x: Any) -> Any:
        """Returns ``model(x)``, ``model(*x)`` of a tuple or ``model(**x)`` of a dict."""
        placed = {place: adapted[name] for place, name in self.places.items()}
        args, kwargs = (x if isinstance(x, tuple) else (x,)), None
        if isinstance(x, dict):
            args, kwargs = (), x
        with _padding_without_index(self.model, placed), _with_dense_gradients(self.sparse):
            return called(self.model, placed, args, kwargs)

    @contextmanager
    def at(self, step: int, second_order: bool) -> Iterator[None]:
        """Runs the forwards inside the ``with`` block at a step, by kernels for this order."""
        counters = self.counters
        with fixed_at(counters, step), with_order(counters, second_order):
            with twice_differentiable(self.model, second_order=second_order):
                yield

    def initial_of(self, tasks: int, *, alone: bool) -> Params:
        """Returns the initial weights for each of so many tasks; for one ``alone`` without T.

        Never the parameters themselves: what ``loss_fn`` reads of the model is not adapted.
        """
        if alone:
            return {name: p.view_as(p) for name, p in self.initial.items()}
        return {name: p.expand(tasks, *p.shape) for name, p in self.initial.items()}

    def gradients(
        self, losses: Tensor, adapted: Params, *, with_graph: bool, first: bool
    ) -> dict[str, Tensor | None]:
        """Returns the gradients of the losses, each by its own task's tensors."""
        wanted = [adapted[name] for name in self.adapting]  # not those frozen since
        # No loss depends on another task's weights: the sum's gradient is each one's.
        found = support_gradients(losses.sum(), wanted, create_graph=with_graph, first=first)
        return {**dict.fromkeys(adapted), **dict(zip(self.adapting, found, strict=True))}

    @contextmanager
    def collecting(self, statistics: BatchStatistics) -> Iterator[None]:
        """Has the layers collect their batch statistics instead of writing them."""
        try:
            for counter in self.counters:
                counter.collected = statistics
            yield
        finally:
            for counter in self.counters:
                counter.collected = None

    def _buffers(self) -> list[tuple[dict[str, Any], str, Any]]:
        own = [held(module, "buffers") for module in self.modules]
        return [(buffers, name, b) for buffers in own for name, b in buffers.items()]

    @contextmanager
    def unchanged_buffers(self) -> Iterator[None]:
        """Refuses a forward that puts another tensor in a buffer's place, as of a vmap's inside.

        Raises:
            RuntimeError: if it does; the buffers are as they were.
        """
        before = self._buffers()
        try:
            yield
        finally:
            changed = [name for own, name, buffer in before if own.get(name) is not buffer]
            for own, name, buffer in before if changed else ():
                own[name] = buffer
        if changed:
            raise RuntimeError(
                f"the forward assigns the buffers {listing(changed)}, and of several tasks at "
                "once none can leave its own behind for the next; pass chunk_size=1 to run the "
                "tasks one by one"
            )

    def learned_outside(self) -> list[Tensor]:
        """Returns the model's parameters that the outer loop alone learns."""
        outer = (p for name, p in self.model.named_parameters() if name not in self.initial)
        return [p for p in outer if p.requires_grad]

    def mode(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Returns what decides how the layers compute, besides their tensors."""
        frozen = tuple(counter.frozen for counter in self.counters)
        return tuple(module.training for module in self.modules), frozen


@contextmanager
def _with_dense_gradients(sparse: list[dict[str, Any]]) -> Iterator[None]:
    """Has embeddings of sparse gradients return dense ones: views, vmap and rates have no rules."""
    try:
        for layer in sparse:
            layer["sparse"] = False
        yield
    finally:
        for layer in sparse:
            layer["sparse"] = True


@contextmanager
def _padding_without_index(model: nn.Module, placed: Params) -> Iterator[None]:
    """Within vmap, lets no gradient reach the padding of embeddings by other means than torch's.

    Its rule (2.13) makes one table of all tasks', of which it spares the first one's row alone.
    """
    padded = []
    for path, layer in model.named_modules() if transforms_active() else ():
        place = f"{path}.weight" if path else "weight"
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None and place in placed:
            padded.append((layer, layer.padding_idx))
            weight = placed[place]
            rows = torch.arange(len(weight), device=weight.device).unsqueeze(1)
            placed[place] = torch.where(rows == layer.padding_idx, weight.detach(), weight)
    try:
        for layer, _ in padded:
            layer.padding_idx = None
        yield
    finally:
        for layer, index in padded:
            layer.padding_idx = index
