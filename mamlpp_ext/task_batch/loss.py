"""A whole batch of tasks at once, with torch.func."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import checked_count
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.steps import BatchStatistics
from mamlpp_ext.task_batch.adapted_model import AdaptedModel
from mamlpp_ext.task_batch.batch import Batch, Tasks, checked_batch
from mamlpp_ext.task_batch.chunks import added_up
from mamlpp_ext.task_batch.gather import gathered
from mamlpp_ext.task_batch.loop import Outcome, TaskLoop
from mamlpp_ext.task_batch.settings import Aggregate, Loss, Settings
from mamlpp_ext.task_batch.trial import way_for
from mamlpp_ext.task_batch.ways import alone
from mamlpp_ext.torch_private import keeps_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TaskBatchResult(NamedTuple):
    """What :func:`task_batch_loss` returns.

    Attributes:
        loss: the meta-loss, mean over tasks, shape []; the one to call ``backward`` on.
        step_losses: the target loss after each inner step, [T, num_steps], detached.
        logits: the target outputs after the last inner step, detached: [T, Q, ...], or a tree of
            such, as the model returns it.
    """

    loss: Tensor
    step_losses: Tensor
    logits: Any


def task_batch_loss(
    model: nn.Module,
    lslr: LSLR,
    batch: Batch,
    loss_fn: Loss,
    *,
    num_steps: int,
    aggregate: Aggregate | None = None,
    second_order: bool = True,
    rematerialize: bool = False,
    chunk_size: int | None = None,
    all_step_losses: bool = True,
    process_group: ProcessGroup | None = None,
    inner_loss_fn: Loss | None = None,
) -> TaskBatchResult:
    """Adapts to a meta-batch of tasks at once and returns the meta-loss.

    Equal to the loop over tasks, inner steps, support forward, update and target forward, with
    ``torch.func.vmap`` in place of the loop over tasks. In training mode the running statistics of
    per-step layers are updated once it succeeds, as T tasks in turn would have left them. Random
    layers (dropout) draw anew for every task. Under ``torch.no_grad()`` it evaluates.

    The first time that a model is given, a step of two tasks is run by vmap and of each alone, and
    has to come to the same, or an error says so: some of vmap's rules are wrong without a word.

    Args:
        model: the model; its parameters are the initial weights and are not changed.
        lslr: the rates; they decide what is adapted.
        batch: support inputs [T, S, ...], support labels [T, S, ...], target inputs [T, Q, ...],
            target labels [T, Q, ...]. Inputs of several tensors are a tuple, for ``model(*x)``, or
            a dict, for ``model(**x)``; labels may be any tree that ``torch.utils._pytree`` knows,
            or a dataclass. In such each tensor has the tasks in dimension 0, whatever follows.
        loss_fn: ``(output, labels) -> 0-dim loss`` of one task, e.g. ``F.cross_entropy``; it gets
            the output as the model returns it. If it is a module, its parameters are learned as
            the model's are. What it reads of the model itself are the initial weights, not a task's
            (weight decay of the adapted ones takes a loop with :meth:`LSLR.update`).
        num_steps: K, the number of inner steps.
        aggregate: from step losses [T, num_steps] to a loss for each task, [T]:
            :class:`MultiStepLoss`, or any function; None is the final step's loss. In
            :class:`MultiStepLoss`, :class:`FinalStepLoss` and None tasks weigh the same, which
            ``rematerialize`` and ``chunk_size`` make use of: no graph of target losses is kept.
        second_order: whether to differentiate through the inner gradients.
        rematerialize: keep only each step's weights, and gradients as large, and rebuild its graph
            in the backward: memory nearly flat in ``num_steps``, for more time. (In first order
            there is no graph of a step, and this costs nothing.) Gradients then reach the model,
            the rates, the batch and the parameters of ``loss_fn``, not tensors that it closes over,
            and have no graph themselves.
        chunk_size: how many tasks at once; None for all. The gradients of a chunk are taken before
            the next begins, so memory is that of one chunk; they then reach what they reach with
            ``rematerialize``, and the parameters of an ``aggregate`` that is a module. Nothing is
            computed twice, but few tasks at once take longer each. ``aggregate`` is applied to each
            chunk.
        all_step_losses: whether target losses that do not enter the meta-loss (those of weight 0
            in a :class:`MultiStepLoss`, all but the last without one) are computed too. False saves
            their forwards, which then leave no statistics either; in ``step_losses`` they are NaN.
        process_group: processes with equally many tasks each of one meta-batch; their statistics
            are gathered, so that each is left with those of all. None: this process alone.
        inner_loss_fn: ``(output, y_support) -> 0-dim loss`` to adapt by where it is another than
            ``loss_fn``, which then measures the targets alone; its parameters are learned, too.

    Returns:
        The meta-loss, the step losses and the last logits.

    Raises:
        RuntimeError: if the model does what vmap cannot run or computes wrongly (``chunk_size=1``
            does not use it), if torch has no second derivative of it, or in
            ``torch.inference_mode()``.
        TypeError: if a count is not a whole number, an argument of another kind, or ``loss_fn``
            does not return a tensor.
        ValueError: if shapes do not agree, the loss is not 0-dim or ``aggregate`` returns anything
            but [T], a step is out of range, the rates are another model's or all frozen, or the
            model has a BatchNorm or InstanceNorm of torch's with running statistics, which vmap
            cannot update.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> batch = (torch.randn(4, 5, 3), torch.randint(2, (4, 5)),
        ...          torch.randn(4, 7, 3), torch.randint(2, (4, 7)))
        >>> lslr = LSLR(net, num_steps=5)
        >>> result = task_batch_loss(net, lslr, batch, nn.functional.cross_entropy, num_steps=5)
        >>> result.loss.backward()
        >>> result.step_losses.shape, result.logits.shape
        (torch.Size([4, 5]), torch.Size([4, 7, 2]))

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4; the loop is that of MAML.
    """
    settings = Settings(
        loss_fn,
        num_steps,
        aggregate,
        second_order,
        rematerialize,
        all_step_losses,
        inner_loss_fn,
    ).checked()
    tasks = checked_batch(batch)
    size = len(tasks) if chunk_size is None else checked_count("chunk_size", chunk_size)
    _check_model(model)
    settings = settings._replace(chunked=size < len(tasks))
    adapted = AdaptedModel(model, lslr, settings.num_steps)
    loop = TaskLoop(adapted, settings, tasks)
    loss, done = _learned_from(tasks, min(size, len(tasks)), loop)
    statistics = tuple(found.statistics for found in done)
    _commit(statistics if process_group is None else gathered(statistics, process_group))
    outputs = zip(*(found.outputs for found in done), strict=True)
    logits = done[0].rebuild([torch.cat(parts) for parts in outputs])
    return TaskBatchResult(loss, torch.cat([found.step_losses for found in done]), logits)


def _learned_from(tasks: Tasks, size: int, loop: TaskLoop) -> tuple[Tensor, list[Outcome]]:
    """Returns the meta-loss, with its graph or its gradients, and the outcome of each chunk."""
    way = way_for(loop.model, loop.settings, tasks, size)
    done: list[Outcome] = []

    def loss_of(part: Tasks) -> Tensor:
        found = loop.run(part, way if len(part) > 1 else alone)
        done.append(found._replace(step_losses=found.step_losses.detach()))
        return loop.settings.loss_of_tasks(found.step_losses).mean() * (len(part) / len(tasks))

    # Not a generator, whose variables would hold the graph of the chunk before.
    losses = map(loss_of, tasks.in_chunks(size))
    if loop.settings.chunked and torch.is_grad_enabled():
        return added_up(losses, loop.learned_from(tasks)), done
    return torch.stack(list(losses)).sum(), done


@torch.no_grad()
def _commit(chunks: tuple[BatchStatistics, ...]) -> None:
    """Takes the statistics of every task into the layers, in the order of tasks in turn."""
    for statistics in chunks:
        by_place: dict[tuple[nn.Module, int], list[tuple[Tensor, Tensor]]] = {}
        for place, mean, variance in statistics:
            by_place.setdefault(place, []).append((mean, variance))
        for (layer, row), seen in by_place.items():
            means, variances = (torch.stack(values, dim=1) for values in zip(*seen, strict=True))
            layer.absorb(row, means.flatten(0, 1), variances.flatten(0, 1))  # type: ignore[operator]


def _check_model(model: nn.Module) -> None:
    """Raises if the model, or the grad mode, rules an inner loop out."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "the inner loop needs gradients, which torch.inference_mode() rules out; evaluate "
            "under torch.no_grad() instead"
        )
    for name, layer in model.named_modules():
        if keeps_statistics(layer):
            raise ValueError(
                f"layer '{name}' ({type(layer).__name__}) keeps running statistics, which vmap "
                "cannot update; convert the model with convert_norm(model, num_steps), to keep one "
                "set of them for all steps with convert_norm(model, 1, extra_steps='last'), or "
                "build the layer with track_running_stats=False"
            )
