"""Target losses are differentiated at once where no graph is kept, if they share a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from conftest import nodes
from mamlpp_ext.task_batch import loss as task_batch
from mamlpp_ext.task_batch.adapted_model import AdaptedModel
from mamlpp_ext.task_batch.batch import checked_batch
from mamlpp_ext.task_batch.chunks import differentiated
from mamlpp_ext.task_batch.loop import TaskLoop
from mamlpp_ext.task_batch.settings import Settings

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 3
FORMS = {
    "rematerialised": {"rematerialize": True},
    "chunks of 1": {"chunk_size": 1},
    "chunks of 3": {"chunk_size": 3},
    "both": {"chunk_size": 2, "rematerialize": True},
}


class Unequal(mpp.MultiStepLoss):
    """A subclass may weigh tasks, here the hard ones more."""

    def __call__(self, step_losses: Any) -> Tensor:
        return super().__call__(step_losses).square()


AGGREGATES: dict[str, Callable[..., Any]] = {
    "none": lambda: None,
    "final": mpp.FinalStepLoss,
    "multi-step": lambda: mpp.MultiStepLoss(STEPS, 10),
    "unequal": lambda: Unequal(STEPS, 10),
    "a function": lambda: lambda losses: losses.amax(1),
}


def gradients(net: nn.Module, lslr: mpp.LSLR, tasks: Any, **settings: Any) -> list[Tensor]:
    net, lslr = copy.deepcopy((net, lslr))
    result = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, num_steps=STEPS, **settings)
    learned = [*net.parameters(), *lslr.parameters()]
    return [result.loss.detach(), *torch.autograd.grad(2 * result.loss, learned)]


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_those_of_one_graph(
    net: nn.Module,
    lslr: mpp.LSLR,
    tasks: Any,
    form: dict[str, Any],
    aggregate: str,
    second_order: bool,
) -> None:
    settings = {"aggregate": AGGREGATES[aggregate](), "second_order": second_order}
    expected = gradients(net, lslr, tasks, **settings)
    found = gradients(net, lslr, tasks, **settings, **form)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("aggregate", "second_order", "calls"),
    [
        # Support and target of every step; support of two steps rebuilt.
        ("multi-step", True, 3 + 3 + 2),
        ("none", True, 3 + 3 + 2),
        # Targets of two steps are rebuilt, too.
        ("unequal", True, 3 + 3 + 2 + 2),
        ("a function", True, 3 + 3 + 2 + 2),
        # No graph of the support, so nothing to rebuild.
        ("multi-step", False, 3 + 3),
        ("unequal", False, 3 + 3 + 2),
    ],
)
def test_how_much_is_rebuilt(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, aggregate: str, second_order: bool, calls: int
) -> None:
    count = []

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        count.append(1)
        return F.cross_entropy(logits, labels)

    for _ in range(2):  # the first time a model is seen, vmap is tried on it
        count.clear()
        mpp.task_batch_loss(
            net,
            lslr,
            tasks,
            loss_fn,
            num_steps=STEPS,
            aggregate=AGGREGATES[aggregate](),
            second_order=second_order,
            rematerialize=True,
        ).loss.backward()
    assert len(count) == calls


def test_a_chunk_holds_no_graph_of_them(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = task_batch.added_up

    def measured(losses: Any, tensors: Any) -> Tensor:
        return real((sizes.append(nodes(loss)) or loss for loss in losses), tensors)

    monkeypatch.setattr(task_batch, "added_up", measured)
    for aggregate in ("multi-step", "unequal"):
        gradients(net, lslr, tasks, aggregate=AGGREGATES[aggregate](), chunk_size=2)
    at_once, _, kept, _ = sizes
    # Of every step that is four layers and the loss, in several nodes each; at once it is one node.
    assert kept - at_once > STEPS * 5


def test_differentiated() -> None:
    weight, factor = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.clone()

    def run(w: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        return factor * (w**3).sum(1) + constant, w * 2

    constant = torch.ones(4)
    losses, doubled = differentiated(run, (weight, constant), [factor, unused], keep)
    torch.testing.assert_close(losses, run(weight, constant)[0])
    assert losses.requires_grad
    assert not doubled.requires_grad
    assert nodes(losses.sum()) == 1 + 1 + 3  # the sum, the function, and the three that learn
    learned = [weight, factor, unused]
    for _ in range(2):
        found = torch.autograd.grad(3 * losses.sum(), learned, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found[:2], (18 * weight**2, 3 * (weight**3).sum()))
        assert found[2] is None
    assert len(kept) == 2


def test_gradients_do_not_outlive_the_backward() -> None:
    """However long the loss is held."""
    weight = torch.randn(3, requires_grad=True)
    losses, _ = differentiated(lambda w: (w**2, w * 1), (weight,), [])
    losses.sum().backward()
    assert losses.requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


@pytest.mark.parametrize(
    ("change", "expected"),
    [(None, True), ("float16", False), ("autocast", False), ("outer", False), ("data", False)],
)
def test_when_they_are_taken_at_once(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, change: str | None, expected: bool
) -> None:
    """Not where a scaled loss would keep them from underflowing, nor where they are large."""
    if change == "float16":
        net.half()
    if change == "outer":
        lslr = mpp.LSLR(net, STEPS, adapt="head.bias")
    batch = [t.requires_grad_() if change == "data" and t.is_floating_point() else t for t in tasks]
    with torch.autocast("cpu", torch.float16, enabled=change == "autocast"):
        settings = Settings(
            F.cross_entropy,
            num_steps=STEPS,
            aggregate=None,
            second_order=True,
            rematerialize=True,
            all_step_losses=True,
        )
        loop = TaskLoop(AdaptedModel(net, lslr, STEPS), settings, checked_batch(tuple(batch)))
    assert loop.early == expected


def test_a_scaled_loss_keeps_small_gradients(net: nn.Module, tasks: Any) -> None:
    net, batch = net.float(), [t.float() if t.is_floating_point() else t for t in tasks]
    lslr = mpp.LSLR(net, STEPS)
    found = []
    for rematerialize in (False, True):
        with torch.autocast("cpu", torch.float16):
            loss = mpp.task_batch_loss(
                net,
                lslr,
                tuple(batch),
                lambda logits, labels: 1e-6 * F.cross_entropy(logits, labels),
                num_steps=STEPS,
                aggregate=mpp.MultiStepLoss(STEPS, 10),
                rematerialize=rematerialize,
            ).loss
        found.append(torch.autograd.grad(2.0**16 * loss, list(net.parameters())))
    assert all(grad.count_nonzero() for grad in found[0])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)
