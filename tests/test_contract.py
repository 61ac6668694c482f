"""Forwards that the kernels of an earlier version changed the meaning of: each as in plain torch.

On a net of two convolutions, against a plain loop over torch's own layers. ``test_forwards.py`` has
random ones of the kind.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from mamlpp_ext.norm import run
from random_forwards import CHANNELS, OPS, Forward, Scaling, make, tasks, torchs
from test_forwards import assert_as_in_torch, outcome

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
PATHS = ("by hand", "higher", "torchopt", "task_batch", "rematerialised", "one by one")
# By which functions a stranger reads or writes a feature map, and how its run of layers ends.
ROWS = {
    "writes through a view": ("writes_through_a_view", "none"),
    "writes through contiguous": ("writes_through_contiguous", "none"),
    "keeps a view and writes": ("keeps_a_view_and_writes", "none"),
    "reads strides": ("reads_strides", "relu"),
    "takes by stride": ("takes_by_stride", "relu"),
    "views of views": ("views", "relu"),
    "complex views": ("complex_views", "relu"),
    "a function's backward": ("own_function", "relu"),
    "weight standardisation": ("standardised", "relu"),
    "somebody's mode": ("within_a_mode", "relu"),
}


@pytest.fixture(params=[0, 10**9], ids=["as one", "one by one"], autouse=True)
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LEAST_AS_ONE", request.param)
    for name in ("_LEAST_FIRST_ORDER", "_LEAST_SECOND_ORDER"):
        monkeypatch.setattr(run, name, 0)


def agree(plan: Forward, path: str, second_order: bool) -> None:
    assert_as_in_torch(path, plan, second_order, outcome("torch", plan, second_order))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS)
def test_what_a_forward_does_to_a_feature_map(row, path, second_order) -> None:
    op, activation = ROWS[row]
    blocks = ((activation, "none", False), ("relu", "pool", False))
    agree(Forward(blocks, ((op,), (op,)), None, False, (0, 0, 0), 1), path, second_order)


@pytest.mark.parametrize("path", PATHS)
def test_a_spatial_transformer(path) -> None:
    blocks = (("relu", "none", False), ("relu", "pool", False))
    agree(Forward(blocks, (("spatial_transformer",), ()), None, False, (0, 0, 0), 1), path, False)


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_convolution_is_frozen_after_the_rates_were_made(path, second_order) -> None:
    blocks = (("relu", "pool", False), ("relu", "pool", False))
    agree(Forward(blocks, ((), ()), None, True, (0, 0, 0), 1), path, second_order)


@pytest.mark.parametrize("hook", ["keeps", "keeps gradients", "changes"])
@pytest.mark.parametrize("path", [path for path in PATHS if path != "higher"])
def test_a_hook_on_a_layer_of_a_run(path, hook) -> None:
    blocks = (("relu", "pool", False), ("relu", "pool", False))
    agree(Forward(blocks, ((), ()), hook, False, (0, 0, 0), 1), path, True)


PLAIN = Forward(
    (("relu", "pool", False), ("leaky", "none", True)), ((), ()), None, False, (0, 0, 0), 1
)


def loops(net: nn.Module, lslr: mpp.LSLR, use: Callable[[nn.Module], Any]) -> list[Any]:
    """Uses the adapted model inside of each adapter's context."""
    found = []
    x, y, *_ = (part[0] for part in tasks(PLAIN))
    with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(x), y))
        found.append(use(fnet))
    with mpp_torchopt.innerloop_ctx(net, lslr) as inner_opt:
        inner_opt.step(F.cross_entropy(net(x), y))
        found.append(use(net))
    return found


def test_evaluation_inside_a_context_in_inference_mode() -> None:
    net, _ = make(PLAIN)
    x = tasks(PLAIN)[2][0]

    def evaluated(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return model(x)

    other = torchs(copy.deepcopy(net))
    expected = loops(other, mpp.LSLR(other, 2), lambda model: model(x))
    other_rates = loops(net, mpp.LSLR(net, 2), evaluated)
    for found, want in zip(other_rates, expected, strict=True):
        assert found.is_inference()
        torch.testing.assert_close(found, want.detach())


def test_somebodys_mode_around_the_model() -> None:
    net, _ = make(PLAIN)
    x = tasks(PLAIN)[2][0]

    def scaled(model: nn.Module) -> Tensor:
        with Scaling():
            return model(x)

    other = torchs(copy.deepcopy(net))
    expected = loops(other, mpp.LSLR(other, 2), scaled)
    for found, want in zip(loops(net, mpp.LSLR(net, 2), scaled), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_gradients_in_highers_callback_can_be_viewed() -> None:
    net, lslr = make(PLAIN)
    x, y, *_ = (part[0] for part in tasks(PLAIN))
    seen: list[Any] = []

    def callback(grads: list[Tensor]) -> list[Tensor]:
        seen.extend(grad.view(-1) for grad in grads if grad is not None)
        return grads

    with mpp_higher.innerloop_ctx(net, lslr) as (fnet, diffopt):
        diffopt.step(F.cross_entropy(fnet(x), y), grad_callback=callback)
    assert len(seen) >= len(lslr.names) - 3  # all but those of layers that are not called


def test_hessians_by_vmap_over_backwards() -> None:
    net, _ = make(PLAIN)
    x, y, *_ = (part[0] for part in tasks(PLAIN))

    def hessian(model: nn.Module, vectorize: bool) -> Tensor:
        def loss(bias: Tensor) -> Tensor:
            params = {"stages.0.0.bias": bias, "extra.bias": bias}
            with mpp.frozen_statistics(model):
                return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

        return torch.autograd.functional.hessian(loss, torch.ones(CHANNELS), vectorize=vectorize)

    expected = hessian(torchs(copy.deepcopy(net)), False)
    torch.testing.assert_close(hessian(net, True), expected, rtol=1e-7, atol=1e-9)


def test_checkpointing_a_layer_that_knows_no_step() -> None:
    """From many values on, in second order: what is recomputed is what was computed."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.first, self.second = first, nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return checkpoint(lambda h: F.max_pool2d(self.second(h), 2), h, use_reentrant=False)

    net = mpp.convert_batchnorm(Checkpointed(), 1)
    x = torch.randn(8, 1, 48, 48)

    def gradients(model: nn.Module) -> list[Tensor]:
        learned = [*model.first.parameters(), *model.second.parameters()]
        grads = torch.autograd.grad(model(x).square().mean(), learned, create_graph=True)
        return [*torch.autograd.grad(sum(g.square().sum() for g in grads), learned)]

    other = torchs(copy.deepcopy(net))
    for found, want in zip(gradients(net), gradients(other), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_dropout_in_place_behind_a_run(chunk_size) -> None:
    net = mpp.convert_batchnorm(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.0, inplace=True),  # of nothing, so that it can be compared
            nn.Flatten(),
            nn.Linear(8 * 16, 3),
        ),
        2,
    )
    lslr = mpp.LSLR(net, 2)
    batch = (torch.randn(2, 4, 1, 8, 8), torch.randint(3, (2, 4))) * 2

    def gradients(model: nn.Module) -> list[Tensor]:
        how = {"num_steps": 2, "chunk_size": chunk_size}
        result = mpp.task_batch_loss(model, lslr, batch, F.cross_entropy, **how)
        model.zero_grad()
        result.loss.backward()
        return [p.grad for p in model.parameters()]

    found = gradients(net)
    net[4] = nn.Identity()
    for ours, want in zip(found, gradients(net), strict=True):
        torch.testing.assert_close(ours, want)


def test_copies_made_inside_a_context_hold_nothing_of_it() -> None:
    net, lslr = make(PLAIN)
    with mpp_torchopt.innerloop_ctx(net, lslr):
        twin, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (net, twin, pickled):
        hooks = [layer._forward_hooks or layer._forward_pre_hooks for layer in other.modules()]
        assert not any(hooks)


@pytest.mark.parametrize("path", PATHS)
def test_a_forwards_own_error_comes_through(path, monkeypatch) -> None:
    def fails(net: Any, h: Tensor) -> Tensor:
        h.view(len(h), -1).clamp_(min=0)
        raise LookupError("the forward's own")

    monkeypatch.setitem(OPS, "fails", fails)
    blocks = (("none", "none", False),)
    with pytest.raises(LookupError, match="the forward's own"):
        outcome(path, Forward(blocks, (("fails",),), None, False, (0, 0, 0), 1), True)
