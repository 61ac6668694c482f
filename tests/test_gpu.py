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
from mamlpp_ext.benchmark.loops import LEARNERS, LOOPS, MetaIteration, make_learner
from mamlpp_ext.closed_form import batch_normalize
from mamlpp_ext.convolution import convolution

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
    cpu, gpu = (
        found_by(model, batch, learner, loop, second_order, device) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(gpu, cpu, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["default", "channels_last"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_batch_norm(check: Any, affine: bool, layout: Any, tasks: int | None) -> None:
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
        return convolution(torch.conv2d, 2, True, x, w, b, **how)

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


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_in_a_graph(model: nn.Module, batch: Any, second_order: bool) -> None:
    """As docs/recipes.md has it: replayed on other tasks, it computes what it computes without."""
    net = mpp.convert_batchnorm(model, STEPS).cuda()
    plain = mpp.TaskBatchLoss(
        net, mpp.LSLR(net, STEPS), F.cross_entropy, num_steps=STEPS, aggregate=mpp.MultiStepLoss(3, 9)
    )
    first, second = ([t.cuda() for t in batch], [t.flip(0).cuda() for t in batch])
    twin = copy.deepcopy(plain)
    before = copy.deepcopy(plain.state_dict())
    graphed: Any = torch.cuda.make_graphed_callables(plain, tuple(first))
    graphed.load_state_dict(before)
    for tasks in (first, second, first):
        for module in (graphed, twin):
            module.zero_grad()
            result = module(*tasks)
            result.loss.backward()
            module.found = [result.loss.detach().clone(), result.logits.clone()]
        torch.testing.assert_close(graphed.found, twin.found, rtol=1e-9, atol=1e-11)
        pairs = zip(graphed.parameters(), twin.parameters(), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            dict(graphed.named_buffers()), dict(twin.named_buffers()), rtol=1e-9, atol=1e-11
        )
