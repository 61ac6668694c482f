"""What a benchmark asks: a model, tasks of some size, an order of derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.benchmark.loops import MetaIteration, make_learner
from mamlpp_ext.benchmark.measure import Memory, peak_bytes, stopwatch
from mamlpp_ext.check_setup.model import Trial, check_runs
from mamlpp_ext.check_setup.named import check_one_source, load_batch, load_loss, load_model
from mamlpp_ext.checks import checked_count
from mamlpp_ext.task_batch import Batch, Loss, checked_batch


@dataclass(frozen=True)
class Question:
    """A model and the tasks it is meta-trained on; small, so that it travels to other processes.

    Attributes:
        model: where the model is, ``package.module:name``.
        shape: of one input of noise; empty where ``batch`` makes the inputs.
        ways: classes of a task of noise.
        shots: support examples of a class of noise.
        targets: target examples of a class of noise.
        steps: inner steps.
        tasks: tasks of a meta-iteration of noise.
        second_order: whether to differentiate through the inner gradients.
        multi_step: whether the target losses of all steps count in MAML++, as early in a training.
        chunk_size: how many tasks ``task_batch_loss`` takes at once; None for all.
        channels_last: whether model and images are laid out channels_last.
        device: where to compute.
        threads: of torch on the CPU; None leaves them.
        batch: where the function is that makes the tasks, ``package.module:name``; None for noise.
        loss: where the loss is, likewise; None for the cross entropy of logits.
        seed: of the model and the data.
    """

    model: str
    shape: tuple[int, ...] = ()
    ways: int = 5
    shots: int = 1
    targets: int = 1
    steps: int = 5
    tasks: int = 8
    second_order: bool = True
    multi_step: bool = False
    chunk_size: int | None = None
    channels_last: bool = False
    device: str = "cpu"
    threads: int | None = None
    batch: str | None = None
    loss: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shape = ",".join(map(str, self.shape)) or None
        check_one_source(shape, self.batch, self.loss)
        if shape is None and self.batch is None:
            raise ValueError(
                "neither --shape nor --batch is given; give the shape of one input, such as "
                "--shape 1,28,28, or the function that makes a batch, --batch package.module:name"
            )
        for name in ("ways", "shots", "targets", "steps", "tasks"):
            checked_count(name, getattr(self, name))
        for name in ("chunk_size", "threads"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name))
        if self.channels_last and len(self.shape) != 3:
            raise ValueError(
                f"channels_last is a layout of images [C, H, W], got inputs of shape {self.shape}; "
                "leave it out (a batch of your own is laid out where it is made)"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"device {self.device!r} was asked for, but torch finds no GPU; use 'cpu', or "
                "install a torch that is built for the GPU's driver"
            )

    def __str__(self) -> str:
        order = "second" if self.second_order else "first"
        layout = ", channels_last" if self.channels_last else ""
        if self.batch is not None:
            return f"tasks of {self.batch}, {self.steps} inner steps, {order} order"
        return (
            f"{self.ways}-way {self.shots}-shot, {self.targets} targets a class, inputs "
            f"{'x'.join(map(str, self.shape))}, {self.steps} inner steps, {self.tasks} tasks, "
            f"{order} order{layout}"
        )

    def prepare(self) -> tuple[nn.Module, Batch]:
        """Sets threads and seed; returns the model and the data: noise, or a batch.

        Raises:
            ImportError: if there is no such model or batch.
            TypeError: if what is there is something else.
            ValueError: if the batch is none of tasks.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        model = load_model(self.model).to(self.device).train()
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.batch is None:
            return model, (*self._examples(self.shots), *self._examples(self.targets))
        tasks = load_batch(self.batch)
        return model, tasks.of([t.to(self.device) for t in tasks.tensors]).batch()

    def _examples(self, of_each_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(self.ways, device=self.device).repeat(of_each_class)
        inputs = torch.randn(self.tasks, len(labels), *self.shape, device=self.device)
        return self._laid_out(inputs), labels.expand(self.tasks, -1)

    def _laid_out(self, inputs: Tensor) -> Tensor:
        if not self.channels_last:
            return inputs
        # Not ``Tensor.to``: it leaves images of a single channel as they are, since their memory is
        # the same in both layouts, but convolutions choose theirs by the strides.
        rows = inputs.movedim(-3, -1).clone(memory_format=torch.contiguous_format)
        return rows.movedim(-1, -3)

    def iteration(
        self, prepared: tuple[nn.Module, Batch], learner: str, loop: str
    ) -> MetaIteration:
        """Returns the meta-iteration of a learner in a loop, on what :meth:`prepare` returned."""
        model, batch = prepared
        contender = make_learner(
            model,
            learner,
            loop,
            steps=self.steps,
            second_order=self.second_order,
            chunk_size=self.chunk_size,
            loss_fn=self.loss_fn(),
            multi_step=self.multi_step,
        )
        return MetaIteration(loop, contender, batch)

    def loss_fn(self) -> Loss:
        """Returns the loss."""
        return F.cross_entropy if self.batch is None else load_loss(self.loss)

    def check(self, prepared: tuple[nn.Module, Batch]) -> None:
        """Says what is wrong with a model that does not take the data, or its loss the output.

        Raises:
            TypeError: if an output is of another kind than the loss takes.
            ValueError: if the model takes no such inputs, or returns no such outputs.
        """
        model, batch = prepared
        if self.batch is None:
            check_logits(model, batch, self.ways)
        else:
            check_runs(model, Trial(_first(batch), self.loss_fn()))


def _first(batch: Batch) -> Batch:
    return checked_batch(batch).single().batch()


def check_logits(model: nn.Module, batch: Batch, ways: int) -> None:
    """Says what is wrong with a model whose outputs are no logits of the task's classes.

    Raises:
        TypeError: if it does not return a tensor.
        ValueError: if it takes no noise, or the tensor is not of shape [examples, ``ways`` or
            more].
    """
    inputs = _first(batch)[0]
    logits = check_runs(model, Trial(_first(batch), F.cross_entropy, noise=True))
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned a {type(logits).__name__}, the benchmark needs logits in a "
            "tensor; name a wrapper that returns these alone, or give a batch of your own by "
            "--batch"
        )
    if logits.dim() != 2 or len(logits) != len(inputs) or logits.shape[1] < ways:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {len(inputs)} inputs, the "
            f"benchmark needs logits [{len(inputs)}, {ways} or more]; give it that many outputs, "
            "or set --ways to what it has"
        )


def memory_and_time(question: Question, learner: str, loop: str) -> tuple[Memory, float]:
    """Runs two meta-iterations; to be called in a fresh process.

    Returns:
        The memory, and the seconds of the second iteration.
    """
    iteration = question.iteration(question.prepare(), learner, loop)
    before = peak_bytes(question.device)
    iteration()
    seconds = stopwatch(iteration, question.device)
    return Memory(before, peak_bytes(question.device)), seconds
