"""The meta-loss as a module, for what wraps modules: DistributedDataParallel and others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamlpp_ext.lslr import LSLR, checked_lslr
from mamlpp_ext.schedules import FinalStepLoss, MultiStepLoss
from mamlpp_ext.steps import step_counters
from mamlpp_ext.task_batch.batch import Batch, Rebuild, Tasks, checked_batch
from mamlpp_ext.task_batch.cuda_graph import (
    Captured,
    check_on_one_gpu,
    graph_key,
    plain_attributes,
)
from mamlpp_ext.task_batch.loss import TaskBatchResult, task_batch_loss
from mamlpp_ext.task_batch.settings import Aggregate, Loss
from mamlpp_ext.task_batch.trees import taken_apart

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TaskBatchLoss(nn.Module):
    """:func:`task_batch_loss` as a module that holds the model and its rates.

    Its parameters are the model's, the rates, and those of ``loss_fn`` and ``aggregate`` if these
    are modules: an optimizer, a ``state_dict`` or a wrapper sees all that is learned. With several
    processes, each with its share of the tasks,
    ``DistributedDataParallel(TaskBatchLoss(..., process_group=torch.distributed.group.WORLD))``
    leaves in every process the gradients and running statistics that one process with all tasks, in
    the order of the ranks, would have; the wrapper's defaults do. Make the module after
    ``init_process_group``: before it, ``group.WORLD`` is None. In training mode all processes must
    call it, each with as many tasks; a single one can evaluate this module (not the wrapper) in
    eval mode or with frozen statistics.

    Args:
        model: the model.
        lslr: its rates.
        loss_fn: as in :func:`task_batch_loss`.
        num_steps: K, the number of inner steps.
        aggregate: as in :func:`task_batch_loss`; a :class:`MultiStepLoss` goes on by its ``step``.
        rematerialize: as in :func:`task_batch_loss`.
        chunk_size: likewise.
        all_step_losses: likewise.
        process_group: likewise.
        cuda_graph: on a GPU, capture the forward with its gradients in a CUDA graph and launch that
            from then on, for tasks of the same shape: many times as fast where a network is small.
            The graph's memory is kept. What changes the computation (``second_order``, the weights
            of a :class:`MultiStepLoss`, train and eval, other shapes, an attribute of a layer)
            captures anew, which takes some tenths of a second. Whatever else the model,
            ``loss_fn`` or ``aggregate`` read, such as globals and torch's own settings, is fixed
            when it is captured; their Python and hooks run then alone, a few times, on a copy of
            the model. They may not wait for the GPU (``.item()``). Gradients are limited as with
            ``rematerialize``. Not together with that, nor with ``process_group``: in
            ``DistributedDataParallel`` gradients are averaged, and every process keeps, or takes
            from the first, statistics of its share.
        inner_loss_fn: as in :func:`task_batch_loss`.

    Raises:
        TypeError: if ``lslr`` is no :class:`LSLR`.
        ValueError: if ``lslr`` was made for another model, or ``cuda_graph`` is asked for together
            with what it excludes.

    Example:
        >>> import torch
        >>> net = nn.Linear(3, 2)
        >>> meta_loss = TaskBatchLoss(
        ...     net, LSLR(net, num_steps=5), nn.functional.cross_entropy, num_steps=5)
        >>> labels = torch.tensor([[0, 1, 0, 1]])
        >>> result = meta_loss(torch.randn(1, 4, 3), labels, torch.randn(1, 4, 3), labels)
        >>> result.loss.backward()
        >>> sorted(name for name, _ in meta_loss.named_parameters())
        ['lslr.rates', 'model.bias', 'model.weight']

    Source:
        As :func:`task_batch_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        lslr: LSLR,
        loss_fn: Loss,
        *,
        num_steps: int,
        aggregate: Aggregate | None = None,
        rematerialize: bool = False,
        chunk_size: int | None = None,
        all_step_losses: bool = True,
        process_group: ProcessGroup | None = None,
        cuda_graph: bool = False,
        inner_loss_fn: Loss | None = None,
    ) -> None:
        super().__init__()
        if cuda_graph and (rematerialize or process_group is not None):
            other = "rematerialize=True" if rematerialize else "a process_group"
            raise ValueError(
                f"cuda_graph=True cannot capture what {other} does; leave one of them out"
            )
        # Refuses another model's rates now, not in the first forward.
        checked_lslr(lslr).parameters_of(model)
        self.model, self.lslr = model, lslr
        self.loss_fn, self.num_steps, self.aggregate = loss_fn, num_steps, aggregate
        self.rematerialize, self.chunk_size = rematerialize, chunk_size
        self.all_step_losses, self.process_group = all_step_losses, process_group
        self.cuda_graph = cuda_graph
        self.inner_loss_fn = inner_loss_fn
        self._captured: Captured | None = None

    def forward(
        self,
        x_support: Any,
        y_support: Any,
        x_target: Any,
        y_target: Any,
        *,
        second_order: bool = True,
    ) -> TaskBatchResult:
        """Adapts to a meta-batch and returns its loss, step losses and logits.

        Args:
            x_support: support inputs, [T, S, ...], a tuple for ``model(*x)`` or a dict for
                ``model(**x)``.
            y_support: support labels, [T, S, ...], or a tree of such.
            x_target: target inputs, [T, Q, ...], likewise.
            y_target: target labels, [T, Q, ...], likewise.
            second_order: whether to differentiate through the inner gradients, such as
                ``da.second_order``.

        Returns:
            As :func:`task_batch_loss`, of this process's tasks.

        Raises:
            TypeError: as :func:`task_batch_loss`.
            ValueError: as :func:`task_batch_loss`, or if ``cuda_graph`` was asked for and the batch
                is not on a GPU.
            RuntimeError: if what ``cuda_graph`` captures waits for the GPU.
        """
        batch = (x_support, y_support, x_target, y_target)
        if self.cuda_graph and torch.is_grad_enabled():
            return self._replayed(batch, second_order)
        return self._computed(batch, second_order=second_order)

    def _computed(self, batch: Batch, *, second_order: bool) -> TaskBatchResult:
        return task_batch_loss(
            self.model,
            self.lslr,
            batch,
            self.loss_fn,
            num_steps=self.num_steps,
            aggregate=self.aggregate,
            second_order=second_order,
            rematerialize=self.rematerialize,
            chunk_size=self.chunk_size,
            all_step_losses=self.all_step_losses,
            process_group=self.process_group,
            inner_loss_fn=self.inner_loss_fn,
        )

    def _replayed(self, batch: Batch, second_order: bool) -> TaskBatchResult:
        tasks = checked_batch(batch)
        check_on_one_gpu(self, tasks.tensors)
        frozen = [counter.frozen for counter in step_counters(self)]
        used = (self.loss_fn, self.inner_loss_fn, self.aggregate)
        structures = [examples.structure for examples in tasks]
        functions = [_what_it_does(function) for function in used]
        key = (second_order, frozen, functions, structures, *graph_key(self, tasks.tensors))
        if self._captured is None or self._captured.key != key:
            self._captured = None  # or its memory is still taken when the next is captured
            compute = partial(_computed_tree, tasks, second_order)
            self._captured = Captured(compute, self, tasks.tensors, key)
        loss, step_losses, *outputs = self._captured(self, tasks.tensors)
        return TaskBatchResult(loss, step_losses, self._captured.rebuild(outputs))


def _computed_tree(
    tasks: Tasks, second_order: bool, module: TaskBatchLoss, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Rebuild]:
    """Returns what the module computes, as tensors, and what makes its output of the others."""
    result = module._computed(tasks.of(tensors).batch(), second_order=second_order)
    outputs = taken_apart(result.logits, outputs=True)
    return [result.loss, result.step_losses, *outputs.tensors], outputs.rebuild


def _what_it_does(function: Any) -> tuple[Any, ...]:
    """Returns what changes if ``loss_fn`` or ``aggregate`` computes something else."""
    if isinstance(function, MultiStepLoss):
        return (function.weights.tolist(),)  # not the epoch: once annealed, they stay
    if function is None or isinstance(function, FinalStepLoss):
        return ()
    return function, plain_attributes(function) if hasattr(function, "__dict__") else ()
