"""When a CUDA graph is captured, and what its replays hand on; a plain repetition stands for it.

With a real one: ``test_gpu.py``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.task_batch import cuda_graph
from mamlpp_ext.task_batch import module as task_batch_module
from mamlpp_ext.task_batch.cuda_graph import Captured


@pytest.fixture(autouse=True)
def repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a graph: runs once to warm up, then at every replay, into the same tensors."""

    def recorded(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        run()
        run()
        outputs, grads = run()

        def replay() -> None:
            for places, values in zip((outputs, grads), run(), strict=True):
                for place, value in zip(places, values, strict=True):
                    assert (place is None) == (value is None)
                    if place is not None:
                        place.copy_(value)

        return replay, (outputs, grads)

    monkeypatch.setattr(cuda_graph, "recorded", recorded)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_batch_module, "check_on_one_gpu", lambda *tensors: None)


class Scaled:
    """Cross-entropy, times a number."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(logits, labels)


def make(net: nn.Module, lslr: mpp.LSLR, **settings: Any) -> mpp.TaskBatchLoss:
    settings = {"num_steps": 3, "aggregate": mpp.MultiStepLoss(3, 2), **settings}
    return mpp.TaskBatchLoss(net, lslr, Scaled(), **settings)


class Case:
    """A module that replays and one that computes, from the same state."""

    def __init__(self, net: nn.Module, lslr: mpp.LSLR, **settings: Any) -> None:
        self.plain = make(*copy.deepcopy((net, lslr)), **settings)
        self.graphed = make(net, lslr, cuda_graph=True, **settings)
        self.seen: list[Captured | None] = []

    @property
    def both(self) -> tuple[mpp.TaskBatchLoss, mpp.TaskBatchLoss]:
        return self.graphed, self.plain

    def check(self, batch: Any, **settings: Any) -> bool:
        """Compares them; returns whether the graph was the one before."""
        found = []
        for module in self.both:
            result = module(*batch, **settings)
            module.zero_grad()
            result.loss.backward()
            grads = {name: p.grad for name, p in module.named_parameters()}
            values = {name: value.detach().clone() for name, value in result._asdict().items()}
            found.append((values, grads, dict(module.named_buffers())))
        torch.testing.assert_close(*found)
        self.seen.append(self.graphed._captured)
        return len(self.seen) > 1 and self.seen[-1] is self.seen[-2]


@pytest.fixture
def case(net: nn.Module, lslr: mpp.LSLR, anywhere: None) -> Case:
    return Case(net, lslr)


def test_a_replay_computes_the_same(case: Case, tasks: Any) -> None:
    assert not case.check(tasks)
    assert case.check([t.flip(0) for t in tasks])
    for module in case.both:  # in place, as an optimizer
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.9)
    assert case.check(tasks)
    case.graphed.load_state_dict(case.plain.state_dict())
    assert case.check(tasks)


CHANGES: dict[str, Callable[[mpp.TaskBatchLoss], object]] = {
    "the weights of MSL": lambda module: module.aggregate.step(),
    "eval": lambda module: module.eval(),
    "what is learned": lambda module: module.model.norm.bias.requires_grad_(False),
    "the memory of a weight": lambda module: module.model.double().float().double(),
    "an attribute": lambda module: setattr(module.model.norm, "momentum", 0.5),
    "the aggregate": lambda module: setattr(module, "aggregate", latest),
    "a layer": lambda module: setattr(module.model, "relu", nn.Tanh()),
    "a tuple": lambda module: setattr(module.model.norm, "_ranks", (2, 3, 4)),
    "the loss": lambda module: setattr(module, "loss_fn", smoothed),
    "an attribute of the loss": lambda module: setattr(module.loss_fn, "factor", 2.0),
    "a setting": lambda module: setattr(module, "chunk_size", 3),
}


def latest(step_losses: Tensor) -> Tensor:
    return step_losses[:, -2:].mean(1)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_captures_anew(
    case: Case, tasks: Any, change: Callable[[mpp.TaskBatchLoss], object]
) -> None:
    case.check(tasks)
    for module in case.both:
        change(module)
    assert not case.check(tasks)
    assert case.check(tasks)


def test_other_calls_capture_anew(case: Case, tasks: Any) -> None:
    case.check(tasks)
    assert not case.check(tasks, second_order=False)
    assert case.check(tasks, second_order=False)
    assert not case.check([t[:2] for t in tasks])
    with mpp.frozen_statistics(case.graphed), mpp.frozen_statistics(case.plain):
        assert not case.check([t[:2] for t in tasks])
    assert not case.check([t[:2] for t in tasks])


def test_annealing_that_has_ended_goes_on_with_its_graph(case: Case, tasks: Any) -> None:
    for _ in range(2):
        for module in case.both:
            module.aggregate.step()
    case.check(tasks)
    for module in case.both:
        module.aggregate.step()
    assert case.check(tasks)


def test_capturing_changes_nothing(
    net: nn.Module, lslr: mpp.LSLR, anywhere: None, tasks: Any
) -> None:
    """Statistics count the tasks once, and a failure not at all."""
    module = make(net, lslr, cuda_graph=True)
    module(*tasks)
    assert net.norm.num_batches_tracked.tolist() == [8, 8, 8]
    before = copy.deepcopy(dict(module.named_buffers()))

    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 6:  # in the second run, when the first has changed the statistics
            raise ValueError("no")
        return F.cross_entropy(logits, labels)

    calls: list[int] = []
    module.loss_fn = fails
    with pytest.raises(ValueError, match="no"):
        module(*tasks)
    torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


class Averaging(nn.Linear):
    """A model that goes by a mean of what it has seen, kept as a plain attribute."""

    mean = torch.zeros(())

    def forward(self, input: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + input.detach().mean()
        return super().forward(input - self.mean)


def test_attributes_that_a_replay_leaves_out_are_refused(anywhere: None) -> None:
    net = Averaging(3, 2)
    tasks = (torch.randn(2, 4, 3), torch.randint(2, (2, 4))) * 2
    module = make(net, mpp.LSLR(net, 3), cuda_graph=True, chunk_size=1)
    with pytest.raises(RuntimeError, match=r"goes on with .* 'model.mean'.* leave cuda_graph out"):
        module(*tasks)
    assert "mean" not in vars(net)
    make(net, mpp.LSLR(net, 3), chunk_size=1)(*tasks)
    assert net.mean


def test_what_was_returned_stays(case: Case, tasks: Any) -> None:
    """Losses and gradients of several calls may be kept, added up and accumulated."""
    batches = [tasks, [t.flip(0) for t in tasks]]
    totals = []
    for module in case.both:
        results = [module(*batch) for batch in batches]
        for result in results:
            (2 * result.loss).backward()
        values = [list(result) for result in results]
        totals.append((values, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(*totals)


def test_gradients_reach_the_batch(case: Case, tasks: Any) -> None:
    x_support, *rest = tasks
    found = []
    for module in case.both:
        x = x_support.clone().requires_grad_()
        module(x, *rest).loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_an_aggregate_that_is_learned(
    net: nn.Module, lslr: mpp.LSLR, anywhere: None, tasks: Any
) -> None:
    case = Case(net, lslr, aggregate=nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    assert not case.check(tasks)
    assert case.check([t.flip(0) for t in tasks])
    assert case.graphed.aggregate[0].weight.grad.any()


def test_an_aggregate_that_takes_notes(
    net: nn.Module, lslr: mpp.LSLR, anywhere: None, tasks: Any
) -> None:
    """Of a class that is not the package's own, too."""

    class Doubled(mpp.MultiStepLoss):
        def __call__(self, step_losses: Any) -> Tensor:
            return 2 * super().__call__(step_losses)

    case = Case(net, lslr, aggregate=Doubled(3, 2))
    assert not case.check(tasks)
    assert case.check([t.flip(0) for t in tasks])
    assert len(case.graphed.aggregate.recent_losses) == 3


def test_evaluation_replays_nothing(case: Case, tasks: Any) -> None:
    with torch.no_grad():
        results = [module(*tasks) for module in case.both]
    assert case.graphed._captured is None
    torch.testing.assert_close(*[list(result) for result in results])


def test_copies_capture_for_themselves(case: Case, tasks: Any) -> None:
    case.check(tasks)
    case.graphed.loss_fn = case.plain.loss_fn = F.cross_entropy
    twin = copy.deepcopy(case.graphed)
    again = pickle.loads(pickle.dumps(case.graphed))
    assert twin._captured is again._captured is None
    torch.testing.assert_close(twin(*tasks).loss, again(*tasks).loss)


def test_gradients_are_taken_by_parameters_of_its_own(case: Case, tasks: Any) -> None:
    """Over the same memory: a graph of the model's own that is alive is on another stream."""
    case.graphed(*tasks)
    captured = case.graphed._captured
    assert captured is not None
    twin = captured.twin
    for p, own in zip(case.graphed.parameters(), twin.parameters(), strict=True):
        assert own is not p
        assert own.data_ptr() == p.data_ptr()
    for buffer, same in zip(case.graphed.buffers(), twin.buffers(), strict=True):
        assert same is buffer


class Offset(nn.Module):
    """Adds a tensor that is neither parameter nor buffer."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


def test_other_tensors_are_read_where_they_are(
    net: nn.Module, lslr: mpp.LSLR, anywhere: None, tasks: Any
) -> None:
    """Those of a module, of the loss and of the aggregate, though they may change in place."""
    value, weight, shares = torch.randn(2), torch.rand(2), torch.rand(3)
    net.add_module("offset", Offset(value))
    loss_fn = partial(F.cross_entropy, weight=weight)
    plain = mpp.TaskBatchLoss(net, lslr, loss_fn, num_steps=3, aggregate=shares.__rmatmul__)
    with mpp.frozen_statistics(net):
        graphed = mpp.TaskBatchLoss(
            net, lslr, loss_fn, num_steps=3, aggregate=shares.__rmatmul__, cuda_graph=True
        )
        for _ in range(2):
            torch.testing.assert_close(graphed(*tasks).loss, plain(*tasks).loss)
            captured = graphed._captured
            for tensor in (value, weight, shares):
                tensor.mul_(0.5)
        torch.testing.assert_close(graphed(*tasks).loss, plain(*tasks).loss)
    assert graphed._captured is captured


def test_a_bad_batch_is_refused_first(case: Case, tasks: Any) -> None:
    with pytest.raises(ValueError, match="batch must hold at least one task"):
        case.graphed(*[t[:0] for t in tasks])
    assert case.graphed._captured is None


def test_distributed_data_parallel_goes_around_it(case: Case, tasks: Any, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(case.graphed)
        for batch in (tasks, [t.flip(0) for t in tasks]):
            grads = []
            for module in (parallel, case.plain):
                module.zero_grad()
                module(*batch).loss.backward()
                grads.append([p.grad for p in module.parameters()])
            torch.testing.assert_close(*grads)
    finally:
        torch.distributed.destroy_process_group()
    assert case.graphed._captured is not None
