"""The inner loop of many tasks at once: one vmapped step after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mamlpp_ext.lslr import LSLR
from mamlpp_ext.rematerialize import rematerialized
from mamlpp_ext.steps import Tape, at_step, per_step_layers

Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class VmappedLoop:
    """The inner loop of a chunk of tasks, one vmapped step after the other."""

    def __init__(
        self, model: nn.Module, lslr: LSLR, loss_fn: Loss, second_order: bool, rematerialize: bool
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, lslr, loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.initial = lslr.parameters_of(model)
        outer = [p for name, p in model.named_parameters() if name not in self.initial]
        learned = [p for p in (*outer, *lslr.parameters()) if p.requires_grad]
        # Read in eval mode; in the list, changing them before the backward is an error.
        read = [b for m in model.modules() if not m.training for b in m.buffers(recurse=False)]
        self.captured = [*learned, *read]
        self.layers = per_step_layers(model).values()
        self.places = _places(model, self.initial)

    def run(self, data: tuple[Tensor, ...], counted: list[bool]) -> tuple[Tensor, Tensor, Tape]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and the tape."""
        adapted: Params = dict(self.initial)
        losses, tape = [], Tape()
        for step, counts in enumerate(counted):
            one_step = _Step(self, step, counts, data)
            if self.rematerialize and torch.is_grad_enabled():
                learned = [tensor for tensor in data if tensor.requires_grad]
                captured = [*self.captured, *learned]
                outputs = rematerialized(one_step, tuple(adapted.values()), captured)
            else:
                outputs = one_step(*adapted.values())
            adapted = dict(zip(adapted, outputs, strict=False))
            loss, logits, *statistics = outputs[len(adapted) :]
            losses.append(loss)
            tape += zip(one_step.places, statistics[::2], statistics[1::2], strict=True)
        return torch.stack(losses, dim=1), logits, tape


class _Step:
    """One inner step of a chunk of tasks, a pure function of the adapted tensors.

    Attributes:
        places: the layer and row of each batch statistic among the outputs.
    """

    def __init__(
        self, inner: VmappedLoop, step: int, counts: bool, data: tuple[Tensor, ...]
    ) -> None:
        self.inner, self.step, self.counts, self.data = inner, step, counts, data
        self.mode = self._mode()
        self.places: list[tuple[nn.Module, int]] = []

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the updated tensors, the target losses [T], the logits and the statistics."""
        if self._mode() != self.mode:  # rebuilding the step would compute something else
            raise RuntimeError(
                "the model was switched between train, eval or frozen_statistics before the "
                "backward of a rematerialised task_batch_loss; call backward first"
            )
        self.places = []
        adapted = dict(zip(self.inner.initial, tensors, strict=True))
        shared = 0 if self.step else None  # all tasks start from the same initial weights
        in_dims = (shared, *[0] * len(self.data))
        with at_step(self.inner.model, self.step):
            return vmap(self._task, in_dims, randomness="different")(adapted, *self.data)

    def _task(self, adapted: Params, *data: Tensor) -> tuple[Tensor, ...]:
        x_support, y_support, x_target, y_target = data
        tracked = torch.is_grad_enabled()
        # torch.func.grad differentiates all the same; in first order its result has no graph.
        with torch.set_grad_enabled(tracked and self.inner.second_order):
            grads, (_, seen) = grad(self._loss, has_aux=True)(adapted, x_support, y_support)
        updated = self.inner.lslr.update(adapted, grads, self.step)
        with torch.set_grad_enabled(tracked and self.counts):
            loss, (logits, seen_later) = self._loss(updated, x_target, y_target)
        return *updated.values(), loss, logits.detach(), *seen, *seen_later

    def _loss(
        self, adapted: Params, x: Tensor, y: Tensor
    ) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tape: Tape = []
        for layer in self.inner.layers:
            layer.inner_step.tape = tape
        try:
            placed = {place: adapted[name] for place, name in self.inner.places.items()}
            logits = functional_call(self.inner.model, placed, (x,), tie_weights=False)
            loss = self.inner.loss_fn(logits, y)
        finally:
            for layer in self.inner.layers:
                layer.inner_step.tape = None
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise (ValueError if isinstance(loss, Tensor) else TypeError)(
                f"loss_fn must return one 0-dim tensor for a task, got {got}; reduce it, e.g. with "
                "reduction='mean'"
            )
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model must return one tensor, got {type(logits).__name__}; wrap it in a "
                "module that picks the logits out"
            )
        self.places += [place for place, _, _ in tape]
        return loss, (logits, [value for _, *values in tape for value in values])

    def _mode(self) -> tuple[tuple[bool, ...], tuple[int, ...]]:
        """What decides how the layers compute, besides their tensors."""
        frozen = tuple(layer.inner_step.frozen for layer in self.inner.layers)
        return tuple(module.training for module in self.inner.model.modules()), frozen


def _places(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns every place that holds one of ``params``, and under which name it goes.

    Left to ``functional_call``, tied weights are put back wrongly where a module stands in two
    places (torch 2.13): the second name finds the replacement and takes it for the original.
    """
    names = {id(p): name for name, p in params.items()}
    return {
        f"{path}.{key}" if path else key: names[id(p)]
        for path, module in model.named_modules()  # a shared module comes once
        for key, p in module._parameters.items()
        if id(p) in names
    }
