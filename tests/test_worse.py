"""What may make MAML++ worse: the page's runs, and two upgrades that failed, remade small."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from guide import STEPS, WAYS, tasks

PAGE = Path(__file__).parents[1] / "docs" / "worse.md"


@pytest.mark.usefixtures("by_size")
def test_what_the_page_shows_runs() -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testfile(str(PAGE), module_relative=False, optionflags=flags).failed == 0


class Upgraded(nn.Module):
    """A functional net whose ``F.batch_norm(training=True)`` has become the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, WAYS)

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        x = F.relu(self.norm(F.conv2d(x, weights["conv.weight"], weights["conv.bias"], 4, 1)))
        return F.linear(x.flatten(1), weights["head.weight"], weights["head.bias"])


@pytest.mark.parametrize("mended", [False, True])
def test_a_code_that_evaluates_after_every_batch(mended: bool) -> None:
    """Its model is in eval mode ever after, which F.batch_norm(training=True) did not mind."""
    draw, _ = tasks(0, 0)
    net = mpp.convert_batchnorm(Upgraded(), 2)
    lslr = mpp.LSLR(net, 2)
    net.eval()  # from the evaluation before the first batch
    for _ in range(2):
        if mended:
            net.train()
        x, y, x_target, y_target = (part[0] for part in draw.sample())
        params = lslr.parameters_of(net)
        for step in mpp.inner_steps(net, 2):
            loss = F.cross_entropy(net(x, params), y)
            grads = torch.autograd.grad(loss, params.values(), create_graph=True)
            params = lslr.update(params, grads, step)
        F.cross_entropy(net(x_target, params), y_target).backward()
        problems = [f for f in mpp.check_setup(net, lslr) if f.startswith("problem:")]
        assert ["in eval mode ('norm')" in problem for problem in problems] == [True] * (not mended)
        net.eval()
    assert net.norm.num_batches_tracked.any() == mended


class Run(NamedTuple):
    """What a training came to.

    Attributes:
        accuracy: on unseen classes.
        named: the iteration in which check_setup named second order first, None if never.
        second_order_from: the iteration from which on it was second order.
    """

    accuracy: float
    named: int | None
    second_order_from: int


def unstable_net(eps: float) -> nn.Sequential:
    """Convolution, ReLU, then norm, with strides of 2: the last norm sees 5 values a channel."""
    torch.manual_seed(0)
    net, channels = nn.Sequential(), 1
    for _ in range(3):
        conv = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)
        net.extend([conv, nn.ReLU(), nn.BatchNorm2d(16, eps=eps)])
        channels = 16
    return net.extend([nn.Flatten(), nn.Linear(16, WAYS)])


def train(plus: bool, eps: float = 1e-5, iterations: int = 60, until_named: bool = False) -> Run:
    """Trains first-order MAML, or MAML++ by the guide's schedules."""
    draw, unseen = tasks(0, 10)
    net = mpp.convert_batchnorm(unstable_net(eps), STEPS if plus else 1, extra_steps="last")
    lslr = mpp.LSLR(net, STEPS, lr=0.4, adapt=None if plus else "*", learnable=plus)
    msl = mpp.MultiStepLoss.for_run(STEPS, iterations) if plus else mpp.FinalStepLoss()
    da = mpp.DerivativeOrderAnnealing.for_run(iterations, 0.1 if plus else 1)
    learned = [p for p in (*net.parameters(), *lslr.parameters()) if p.requires_grad]
    meta_opt = torch.optim.Adam(learned, lr=3e-3)
    end = 1e-5 if plus else 3e-3
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, iterations, eta_min=end)
    named = None
    for iteration in range(iterations):
        meta_opt.zero_grad()
        batch = [part[:2] for part in draw.sample()]
        mpp.task_batch_loss(
            net,
            lslr,
            batch,
            F.cross_entropy,
            num_steps=STEPS,
            aggregate=msl,
            second_order=da.second_order,
        ).loss.backward()
        findings = mpp.check_setup(net, lslr) if named is None else []
        if any("second order is unstable" in finding for finding in findings):
            named = iteration
            if until_named:
                break
        meta_opt.step()
        for schedule in (msl, da, annealing):
            schedule.step()
    return Run(0.0 if until_named else accuracy(net, lslr, unseen), named, da.first_order_epochs)


def accuracy(net: nn.Module, lslr: mpp.LSLR, batches: list[tuple[Tensor, ...]]) -> float:
    right = []
    with torch.no_grad(), mpp.frozen_statistics(net):
        for batch in batches:
            result = mpp.task_batch_loss(net, lslr, batch, F.cross_entropy, num_steps=STEPS)
            right.append((result.logits.argmax(-1) == batch[3]).double().mean())
    return torch.stack(right).mean().item()


@pytest.mark.usefixtures("float64", "by_size")
def test_an_unstable_second_order_is_named_before_its_accuracy_is_lost() -> None:
    run = train(plus=True, until_named=True)
    assert run.named is not None
    assert run.second_order_from <= run.named < 20


@pytest.mark.usefixtures("float64", "by_size")
def test_the_first_advice_mends_it() -> None:
    """A larger eps: second order to the end, above the first-order MAML of the net as it was."""
    maml, advised = train(plus=False), train(plus=True, eps=0.1)
    assert maml.named is advised.named is None
    assert advised.second_order_from == 6
    assert advised.accuracy > maml.accuracy > 0.5, (advised, maml)
