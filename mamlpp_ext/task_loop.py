"""The inner loop of a chunk of tasks: one task, or several by vmap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mamlpp_ext.lslr import LSLR
from mamlpp_ext.rematerialize import rematerialized
from mamlpp_ext.steps import Tape, per_step_layers
from mamlpp_ext.task_step import Loss, Params, Step


class TaskLoop:
    """The inner loop of a chunk of tasks, one step of all of them after the other."""

    def __init__(
        self,
        model: nn.Module,
        lslr: LSLR,
        loss_fn: Loss,
        *,
        second_order: bool,
        rematerialize: bool,
        all_step_losses: bool,
    ) -> None:
        self.model, self.lslr, self.loss_fn = model, lslr, loss_fn
        self.second_order, self.rematerialize = second_order, rematerialize
        self.all_step_losses = all_step_losses
        self.initial = lslr.parameters_of(model)
        outer = [p for name, p in model.named_parameters() if name not in self.initial]
        self.learned = [p for p in (*outer, *lslr.parameters()) if p.requires_grad]
        # Read in eval mode; in the list, changing them before the backward is an error.
        read = [b for m in model.modules() if not m.training for b in m.buffers(recurse=False)]
        self.captured = [*self.learned, *read]
        self.layers = per_step_layers(model).values()
        self.places = _places(model, self.initial)

    def learned_from(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Returns every tensor that the meta-loss is differentiated by."""
        return [t for t in (*self.initial.values(), *self.learned, *batch) if t.requires_grad]

    def run(self, data: tuple[Tensor, ...], counted: list[bool]) -> tuple[Tensor, Tensor, Tape]:
        """Returns the step losses [T, num_steps], the last logits [T, Q, ...] and the tape."""
        tasks = len(data[0])
        single = tasks == 1  # then vmap would only cost
        adapted: Params = dict(self.initial)
        if single:
            data = tuple(tensor[0] for tensor in data)
        else:
            adapted = {name: p.expand(tasks, *p.shape) for name, p in adapted.items()}
        losses, tape = [], Tape()
        for step, counts in enumerate(counted):
            one_step = Step(self, step, counts, data, single)
            # The last step's graph is what the backward begins with: it would be rebuilt at once.
            if self.rematerialize and torch.is_grad_enabled() and step < len(counted) - 1:
                learned = [tensor for tensor in data if tensor.requires_grad]
                captured = [*self.captured, *learned]
                outputs = rematerialized(one_step, tuple(adapted.values()), captured)
            else:
                outputs = one_step(*adapted.values())
            adapted = dict(zip(adapted, outputs, strict=False))
            rest = outputs[len(adapted) :]
            loss, logits, *statistics = (t.unsqueeze(0) for t in rest) if single else rest
            losses.append(loss)
            tape += zip(one_step.places, statistics[::2], statistics[1::2], strict=True)
        return torch.stack(losses, dim=1), logits, tape


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
