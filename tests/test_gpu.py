"""The same numbers on a GPU; skipped where there is none."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import mamlpp_ext as mpp
from mamlpp_ext.benchmark.loops import GRAPH, LEARNERS, LOOPS, MetaIteration, make_learner
from mamlpp_ext.fast_kernels.batch_norm import batch_normalize

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("float64"),
]
STEPS = 3
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def model() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 49, 5))


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    """Four tasks; of so many inputs that the model takes the quicker kernels."""
    labels = torch.arange(5).expand(4, -1)
    images = partial(torch.randn, 4, 5, 1, 28, 28)
    return images(), labels, images(), labels


def found_by(
    model: nn.Module, batch: Any, learner: str, loop: str, second_order: bool, device: str
) -> dict[str, Tensor]:
    """Returns the loss, every meta-gradient and every statistic, on the CPU."""
    model = copy.deepcopy(model).to(device)
    made = make_learner(model, learner, loop, steps=STEPS, second_order=second_order)
    loss = MetaIteration(loop, made, tuple(t.to(device) for t in batch)).gradient()
    learned = [*made.net.named_parameters(), *made.lslr.named_parameters()]
    grads = {name: p.grad for name, p in learned if p.requires_grad}
    found = {"loss": loss, **grads, **dict(made.net.named_buffers())}
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_computes_what_it_does_on_the_cpu(
    model: nn.Module, batch: Any, loop: str, learner: str, second_order: bool
) -> None:
    on_cpu = "task_batch_loss" if loop == GRAPH else loop
    cpu = found_by(model, batch, learner, on_cpu, second_order, "cpu")
    gpu = found_by(model, batch, learner, loop, second_order, "cuda")
    torch.testing.assert_close(gpu, cpu, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["default", "channels_last"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_batch_norm(
    check: Any, affine: bool, layout: Any, tasks: int | None
) -> None:
    x = torch.randn(3, 2, 2, 2, device="cuda").contiguous(memory_format=layout)
    tables = torch.randn(2, 2, device="cuda").unbind() if affine else (None, None)

    def normalize(x: Tensor, *tables: Any) -> Tensor:
        return batch_normalize(x, *(tables or (None, None)), 1e-5)[0]

    inputs = [t for t in (x, *tables) if t is not None]
    function: Any = normalize
    if tasks is not None:
        inputs = [t + torch.randn(tasks, *t.shape, device="cuda") for t in inputs]
        function = torch.func.vmap(normalize)
    assert check(function, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_convolution(check: Any, groups: int, tasks: int | None) -> None:
    def convolve(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        how = {"stride": 2, "padding": 1, "groups": groups}
        return convolve(torch.conv2d, 2, True, None, x, w, b, **how)

    shapes = (2, 2, 4, 4), (4, 2 // groups, 3, 3), (4,)
    lead = () if tasks is None else (tasks,)
    inputs = [torch.randn(*lead, *shape, device="cuda", requires_grad=True) for shape in shapes]
    assert check(convolve if tasks is None else torch.func.vmap(convolve), inputs)


def test_random_layers_are_replayed(model: nn.Module, batch: Any) -> None:
    net = mpp.convert_batchnorm(nn.Sequential(nn.Dropout(0.5), model), STEPS).cuda()
    lslr = mpp.LSLR(net, STEPS)
    grads = []
    for rematerialize in (False, True):
        torch.manual_seed(1)
        result = mpp.task_batch_loss(
            net,
            lslr,
            tuple(t.cuda() for t in batch),
            F.cross_entropy,
            num_steps=STEPS,
            rematerialize=rematerialize,
        )
        grads.append(torch.autograd.grad(result.loss, [*net.parameters(), lslr.rates]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


class Case:
    """A module that replays and its twin that computes, on the same tasks."""

    def __init__(self, model: nn.Module, batch: Any, **settings: Any) -> None:
        net = mpp.convert_batchnorm(model, STEPS).cuda()
        settings = {"num_steps": STEPS, "aggregate": mpp.MultiStepLoss(STEPS, 2), **settings}
        loss_fn = settings.pop("loss_fn", F.cross_entropy)
        plain = mpp.TaskBatchLoss(net, mpp.LSLR(net, STEPS), loss_fn, **settings)
        self.graphed, self.plain = copy.deepcopy(plain), plain
        self.graphed.loss_fn = loss_fn  # and what it holds is not a copy
        self.graphed.cuda_graph = True
        others = [torch.randn_like(t) if t.is_floating_point() else t for t in batch]
        self.batches = [tuple(t.cuda() for t in tasks) for tasks in (batch, others)]

    def check(self, batch: Any, **settings: Any) -> None:
        found = []
        for module in (self.graphed, self.plain):
            torch.manual_seed(0)
            result = module(*batch, **settings)
            module.zero_grad()
            result.loss.backward()
            grads = [p.grad for p in module.parameters()]
            found.append((list(result), grads, dict(module.named_buffers())))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_in_a_graph(model: nn.Module, batch: Any) -> None:
    case = Case(model, batch)
    before = case.plain(*case.batches[0])  # its graph, on the default stream, stays alive
    case.graphed(*case.batches[0]).loss.backward()
    graph = case.graphed._captured
    for tasks in (*case.batches, case.batches[0]):
        case.check(tasks)
    assert case.graphed._captured is graph
    assert before.loss.requires_grad
    case.check(case.batches[0], second_order=False)
    case.check([t[:2] for t in case.batches[0]])
    for module in (case.graphed, case.plain):
        module.aggregate.step()
    case.check(case.batches[1])
    for module in (case.graphed, case.plain):
        module.eval()
    case.check(case.batches[1])
    with torch.no_grad():
        case.graphed(*case.batches[1])


def test_training_in_a_graph(model: nn.Module, batch: Any) -> None:
    """Optimizer steps reach the graph; what a call returned stays as it was."""
    case = Case(model, batch)
    losses = []
    for module in (case.graphed, case.plain):
        meta_opt = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(3):
            meta_opt.zero_grad()
            results = [module(*tasks) for tasks in case.batches]
            sum(result.loss for result in results).backward()
            meta_opt.step()
            losses += [result.loss.detach() for result in results]
    assert len({loss.item() for loss in losses[:6]}) == 6
    torch.testing.assert_close(losses[:6], losses[6:], rtol=1e-9, atol=1e-11)
    states = [
        {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for module in (case.graphed, case.plain)
    ]
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-9)


def cumulative(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    return net


def test_graphs_do_not_share_memory(model: nn.Module, batch: Any) -> None:
    """One goes on when another, captured before or after it, is gone."""
    cases = [Case(copy.deepcopy(model), batch) for _ in range(2)]
    for case in cases:
        case.check(case.batches[0])
    cases[0].check(cases[0].batches[0], second_order=False)  # its first graph is no more
    torch.cuda.empty_cache()
    others = [torch.full((2**20,), torch.nan, device="cuda") for _ in range(64)]
    for case in cases:
        case.check(case.batches[1], second_order=case is cases[1])
    assert all(other.isnan().all() for other in others)


def test_a_loss_that_holds_a_tensor(model: nn.Module, batch: Any) -> None:
    weight = torch.rand(5, device="cuda")
    case = Case(model, batch, loss_fn=partial(F.cross_entropy, weight=weight))
    case.check(case.batches[0])
    torch.cuda.empty_cache()
    others = [torch.full((5,), torch.nan, device="cuda") for _ in range(64)]
    weight.mul_(2 * torch.rand_like(weight))
    case.check(case.batches[1])
    assert all(other.isnan().all() for other in others)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_in_a_graph(model: nn.Module, batch: Any, chunk_size: int) -> None:
    case = Case(cumulative(model), batch, chunk_size=chunk_size, aggregate=None)
    for tasks in case.batches:
        case.check(tasks)


def test_dropout_in_a_graph_draws_anew(model: nn.Module, batch: Any) -> None:
    case = Case(nn.Sequential(nn.Dropout(0.5), model), batch, aggregate=None)
    losses = {case.graphed(*case.batches[0]).loss.item() for _ in range(3)}
    assert len(losses) == 3
    torch.manual_seed(3)
    first = case.graphed(*case.batches[0]).loss
    torch.manual_seed(3)
    torch.testing.assert_close(case.graphed(*case.batches[0]).loss, first)


def test_autocast_in_a_graph(model: nn.Module, batch: Any) -> None:
    case = Case(model.float(), [t.float() if t.is_floating_point() else t for t in batch])
    with torch.autocast("cuda", torch.bfloat16):
        results = [module(*case.batches[0]) for module in (case.graphed, case.plain)]
    torch.testing.assert_close(*[r.loss for r in results], rtol=1e-2, atol=1e-2)
    without = case.graphed(*case.batches[0]).loss  # float32 throughout: another graph
    assert 1e-6 < abs(without - results[0].loss) < 1e-1
    torch.testing.assert_close(without, case.plain(*case.batches[0]).loss)


def test_what_waits_cannot_be_captured(model: nn.Module, batch: Any) -> None:
    """It is said before the capture; statistics and random numbers are as they were."""

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        torch.zeros(1, device="cuda").item()
        return loss

    case = Case(model, batch, loss_fn=loss_fn)
    before, random = copy.deepcopy(dict(case.graphed.named_buffers())), torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph: called a synch"):
        case.graphed(*case.batches[0])
    torch.testing.assert_close(dict(case.graphed.named_buffers()), before, rtol=0, atol=0)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert torch.cuda.get_sync_debug_mode() == 0
