"""learn2learn's clones, as the guide upgrades them: exact, for modules under two names as well.

What is run is the guide's stand-in. Where learn2learn is installed, so is its own code.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")
KINDS = ["clone_and_adapt"]
if importlib.util.find_spec("learn2learn"):
    KINDS.append("learn2learn")


class TwoNames(nn.Module):
    """As learn2learn's OmniglotCNN: a module under two names, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.features = nn.Sequential(nn.Identity(), self.base)
        self.middle, self.tied, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.tied.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tied(torch.tanh(self.middle(self.features(x)))))


@pytest.fixture(params=KINDS)
def parts(request: pytest.FixtureRequest) -> Any:
    module = importlib.import_module(request.param)
    return getattr(module, "algorithms", module).MAML, module.update_module


def adapt(learner: Any, loss: Tensor, lslr: mpp.LSLR, step: int, update_module: Any) -> None:
    """The guide's."""
    fast, rates = dict(learner.module.named_parameters()), lslr.rates_at(step)
    grads = torch.autograd.grad(loss, [fast[n] for n in rates], create_graph=True)
    for name, grad in zip(rates, grads, strict=True):
        fast[name].update = -rates[name] * grad
    update_module(learner.module)


def test_meta_gradients_are_those_of_the_loop_written_out(parts: Any) -> None:
    make, update_module = parts
    net = mpp.convert_batchnorm(TwoNames(), 3)
    lslr = mpp.LSLR(net, 3)
    lslr.rates.data.uniform_(0.05, 0.3)
    x, y = torch.randn(6, 3), torch.tensor([0, 1] * 3)
    leaves = [*net.parameters(), lslr.rates]
    maml = make(net, lr=0.1)

    def by_clones() -> Tensor:
        learner = maml.clone()
        for step in mpp.inner_steps(learner, 3):
            adapt(learner, F.cross_entropy(learner(x), y), lslr, step, update_module)
            loss = F.cross_entropy(learner(x), y)
        return loss

    def written_out() -> Tensor:
        params = lslr.parameters_of(net)
        for step in mpp.inner_steps(net, 3):
            loss = F.cross_entropy(mpp.functional_call(net, params, x), y)
            grads = torch.autograd.grad(loss, params.values(), create_graph=True)
            params = lslr.update(params, grads, step)
            loss = F.cross_entropy(mpp.functional_call(net, params, x), y)
        return loss

    ours, theirs = (
        torch.autograd.grad(make_loss(), leaves) for make_loss in (by_clones, written_out)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for _ in range(2):  # a second clone finds the model as the first did
        by_clones()
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_a_clone_shares_running_statistics(parts: Any) -> None:
    make, _ = parts
    maml = make(nn.Sequential(nn.BatchNorm1d(3)), lr=0.1)
    learner = maml.clone()
    assert learner.module[0].running_mean is maml.module[0].running_mean
    learner(torch.randn(4, 3))
    assert maml.module[0].running_mean.any()
    # a count is written in place, too
    assert maml.module[0].num_batches_tracked == 1


def test_plain_adapt_is_a_gradient_step(parts: Any) -> None:
    make, _ = parts
    net, x = TwoNames().eval(), torch.randn(4, 3)
    learner = make(net, lr=0.1).clone()
    loss = learner(x).square().mean()
    expected = [
        p - 0.1 * g
        for p, g in zip(
            net.parameters(),
            torch.autograd.grad(net(x).square().mean(), [*net.parameters()]),
            strict=True,
        )
    ]
    learner.adapt(loss)
    torch.testing.assert_close([*learner.module.parameters()], expected)
