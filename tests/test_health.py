"""check_setup after a backward: gradients, rates, losses and statistics that go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.check_setup import health

pytestmark = pytest.mark.usefixtures("float64")

PAGE = Path(__file__).parents[1] / "docs" / "worse.md"
loss_fn = nn.functional.cross_entropy


def said(net: nn.Module, lslr: mpp.LSLR | None = None, **parts: Any) -> list[str]:
    """The findings that are of health."""
    findings = mpp.check_setup(net, lslr, **parts)
    return [finding for finding in findings if f"{health._PAGE}#" in finding]


def backward(net: nn.Module, lslr: mpp.LSLR, tasks: tuple[Tensor, ...], **parts: Any) -> None:
    mpp.task_batch_loss(net, lslr, tasks, loss_fn, num_steps=3, **parts).loss.backward()


def test_a_sound_training(net: nn.Module, lslr: mpp.LSLR, tasks: tuple[Tensor, ...]) -> None:
    msl = mpp.MultiStepLoss(3, 10)
    assert not said(net, lslr, multi_step_loss=msl)
    lslr = mpp.LSLR(net, 3)
    backward(net, lslr, tasks, aggregate=msl)
    assert msl.recent_losses.numel() == 3
    assert not said(net, lslr, multi_step_loss=msl)


def test_eval_mode_is_a_problem_at_once(net: nn.Module, lslr: mpp.LSLR) -> None:
    (problem,) = said(net.eval(), lslr)
    for words in (
        "problem: ",
        "eval mode ('norm')",
        "model.train()",
        "F.batch_norm(training=True)",
    ):
        assert words in problem
    assert not said(net.train(), lslr)


def test_eval_mode_without_statistics_or_with_frozen_ones_is_none() -> None:
    untracked = mpp.PerStepBatchNorm1d(3, 2, track_running_stats=False)
    assert not said(nn.Sequential(untracked).eval())
    tracked = nn.Sequential(mpp.PerStepBatchNorm1d(3, 2))
    with mpp.frozen_statistics(tracked):
        assert not said(tracked.eval())


def test_statistics_that_no_forward_updated(
    net: nn.Module, lslr: mpp.LSLR, tasks: tuple[Tensor, ...]
) -> None:
    """The mode was another when the inner loops ran."""
    lslr = mpp.LSLR(net, 3)
    backward(net.eval(), lslr, tasks)
    (problem,) = said(net.train(), lslr)
    assert "no forward has updated the running statistics of 'norm'" in problem
    backward(net, lslr, tasks)
    assert not said(net, lslr)


@pytest.mark.parametrize(("factor", "named"), [(8.0, False), (12.0, True)])
def test_a_meta_gradient_beside_the_weights(factor: float, named: bool) -> None:
    net = nn.Linear(3, 2)
    weights = torch.cat([p.flatten() for p in net.parameters()]).norm()
    net.bias.grad = torch.tensor([factor * weights.item(), 0.0])
    net.weight.grad = torch.zeros(2, 3)
    found = said(net)
    assert len(found) == named
    for words in (
        "problem: ",
        "largest of 'bias'",
        "first order",
        "eps=0.1",
        "before ReLU",
        "clip",
    ):
        assert not named or words in found[0]


def test_a_gradient_of_the_rates_counts(net: nn.Module, lslr: mpp.LSLR) -> None:
    lslr.rates.grad = torch.full_like(lslr.rates, 1e6)
    (problem,) = said(net, lslr)
    assert "largest of 'the rates of LSLR'" in problem


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite(value: float) -> None:
    net = nn.Linear(3, 2)
    net.weight.grad, net.bias.grad = torch.zeros(2, 3), torch.tensor([0.0, value])
    (problem,) = said(net)
    assert "the meta-gradient of 'bias' is not finite" in problem


def test_weights_of_zero_are_no_measure() -> None:
    net = nn.Linear(3, 2)
    for p in net.parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    assert not said(net)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (-0.005, ""),
        (-0.02, "'head.bias' are negative (down to -0.02, from 0.1)"),
        (0.9, ""),
        (1.1, "'head.bias' are more than 10 times what they were (up to 1.1, from 0.1)"),
    ],
)
def test_rates_that_run_away(net: nn.Module, rate: float, words: str) -> None:
    lslr = mpp.LSLR(net, 3, lr=0.1)
    lslr.rates.data[-1, 1] = rate
    found = said(net, lslr)
    assert [finding.startswith("warning: ") for finding in found] == [True] * bool(words)
    assert all(words in finding for finding in found)
    assert not said(net, mpp.LSLR(net, 3, lr=0.0))


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ([1.0, 0.9, 0.8], ""),
        ([1.0, 1.0, 1.2], ""),
        ([1.0, 1.5, 2.0], "1, 1.5, 2"),
        ([1.0, None, torch.inf], "1, inf"),
        ([None, None, 5.0], ""),
    ],
)
@pytest.mark.parametrize("build", [lambda: mpp.MultiStepLoss(3, 0), mpp.FinalStepLoss])
def test_target_losses_that_rise(
    net: nn.Module, build: Callable[[], Any], losses: list[Any], shown: str
) -> None:
    msl = build()
    msl([loss if loss is None else torch.tensor(loss) for loss in losses])
    found = said(net, multi_step_loss=msl)
    assert [f"rises with the inner steps ({shown})" in finding for finding in found] == (
        [True] * bool(shown)
    )


def test_one_task_among_many_says_nothing(net: nn.Module) -> None:
    msl = mpp.MultiStepLoss(2, 10)
    for _ in range(15):
        msl(torch.tensor([1.0, 0.5]))
    msl(torch.tensor([1.0, 3.0]))
    assert not said(net, multi_step_loss=msl)


def test_another_aggregator_is_let_alone(net: nn.Module) -> None:
    assert not said(net, multi_step_loss=lambda losses: losses[-1])


def test_every_finding_has_its_section() -> None:
    source = Path(health.__file__).read_text(encoding="utf-8")
    anchors = set(re.findall(r"_PAGE\}#([a-z-]+)", source))
    titles = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(anchors) == 4
    assert anchors <= {title.lower().replace(" ", "-").replace(",", "") for title in titles}
