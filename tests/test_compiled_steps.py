"""``task_batch_loss(compile=True)``: the same numbers, traced once, and refusals that say why.

Compiling takes long, so most tests run the traced graphs as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, but not compiled."""
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: graph)


def outcome(
    net: nn.Module, lslr: mpp.LSLR, batch: Any, loss_fn: Any = F.cross_entropy, **settings: Any
) -> Any:
    """Runs on copies; returns results, every gradient, and the statistics afterwards."""
    net, lslr = copy.deepcopy((net, lslr))
    batch = tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in batch)
    result = mpp.task_batch_loss(net, lslr, batch, loss_fn, **{"num_steps": 3, **settings})
    result.loss.backward()
    named = [*net.named_parameters(), *lslr.named_parameters()]
    grads = {name: p.grad for name, p in named}
    inputs = [t.grad for t in batch if t.requires_grad]
    values = {name: value.detach() for name, value in result._asdict().items()}
    return values, grads, inputs, dict(net.named_buffers())


SETTINGS: dict[str, dict[str, Any]] = {
    "final step": {},
    "multi-step loss": {"aggregate": mpp.MultiStepLoss(3, 10)},
    "first order": {"second_order": False, "aggregate": mpp.MultiStepLoss(3, 10)},
    "task by task": {"chunk_size": 1},
    "chunks": {"chunk_size": 3},
    "no other losses": {"all_step_losses": False},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_step_as_written(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, settings: dict[str, Any], training: bool
) -> None:
    net.train(training)
    expected = outcome(net, lslr, tasks, **settings)
    found = outcome(net, lslr, tasks, compile=True, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert expected[1]["rates"].abs().min() > 0


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("adapt", ["head.*", "body.weight"])
def test_parameters_that_are_not_adapted(net: nn.Module, tasks: Any, adapt: str) -> None:
    lslr = mpp.LSLR(net, 3, adapt=adapt)
    expected = outcome(net, lslr, tasks)
    torch.testing.assert_close(outcome(net, lslr, tasks, compile=True), expected)
    assert expected[1]["body.bias"].abs().max() > 0


@pytest.mark.usefixtures("uncompiled")
def test_extra_steps_reuse_the_last_row(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    lslr.extra_steps = net.norm.extra_steps = "last"
    expected = outcome(net, lslr, tasks, num_steps=5)
    torch.testing.assert_close(outcome(net, lslr, tasks, num_steps=5, compile=True), expected)


@pytest.mark.usefixtures("uncompiled")
def test_half_precision(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    net, lslr = net.float(), lslr.float()
    batch = tuple(t.float() if t.is_floating_point() else t for t in tasks)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(net, lslr, batch)
        found = outcome(net, lslr, batch, compile=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    full = outcome(net, lslr, batch, compile=True)  # another graph, not the one with the casts
    assert not torch.allclose(full[0]["loss"], found[0]["loss"], rtol=1e-6)


def counting() -> tuple[Callable[[Tensor, Tensor], Tensor], list[int]]:
    calls: list[int] = []

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, labels)

    return loss_fn, calls


@pytest.mark.usefixtures("uncompiled")
def test_a_half_is_traced_once(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    loss_fn, calls = counting()
    optimizer = torch.optim.SGD([*net.parameters(), *lslr.parameters()], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        result = mpp.task_batch_loss(net, lslr, tasks, loss_fn, num_steps=3, compile=True)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert len(calls) == 4  # each half's forward and backward, for all steps and iterations
    assert losses[2] < losses[0]  # the graphs read the parameters as they are now


@pytest.mark.usefixtures("uncompiled")
def test_evaluation_makes_no_backward(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    loss_fn, calls = counting()
    with torch.no_grad():
        found = mpp.task_batch_loss(net, lslr, tasks, loss_fn, num_steps=3, compile=True)
        expected = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, num_steps=3)
    torch.testing.assert_close(found.step_losses, expected.step_losses)
    assert len(calls) == 2


@pytest.mark.usefixtures("uncompiled")
def test_the_module_form(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    settings: dict[str, Any] = {"num_steps": 3}
    plain = mpp.TaskBatchLoss(net, lslr, F.cross_entropy, **settings)
    compiled = mpp.TaskBatchLoss(net, lslr, F.cross_entropy, compile=True, **settings)
    net.eval()
    torch.testing.assert_close(compiled(*tasks).loss, plain(*tasks).loss)


@pytest.mark.usefixtures("uncompiled")
def test_refuses_random_layers(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    net.relu = nn.Dropout(0.5)
    with pytest.raises(ValueError, match=r"bernoulli.*take out dropout, or use compile=False"):
        outcome(net, lslr, tasks, compile=True)
    net.relu.eval()
    outcome(net, lslr, tasks, compile=True)


def test_refuses_adapted_tables(net: nn.Module, tasks: Any) -> None:
    with pytest.raises(ValueError, match=r"'norm\.weight'.*LSLR's adapt, or use compile=False"):
        outcome(net, mpp.LSLR(net, 3, adapt="*"), tasks, compile=True)


def test_refuses_layers_it_does_not_know(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_step, self.num_steps, self.extra_steps = net.norm.inner_step, 3, "error"

        def forward(self, x: Tensor) -> Tensor:
            return x

    net.relu = Strange()
    with pytest.raises(TypeError, match=r"'relu' \(Strange\); use compile=False"):
        outcome(net, lslr, tasks, compile=True)


@pytest.mark.usefixtures("uncompiled")
def test_refuses_a_new_function_each_time(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    def loss() -> None:
        mpp.task_batch_loss(net, lslr, tasks, counting()[0], num_steps=3, compile=True)

    for _ in range(8):  # of two halves each
        loss()
    with pytest.raises(RuntimeError, match=r"16 variants.*the same loss_fn object"):
        loss()


@pytest.mark.usefixtures("uncompiled")
def test_a_switched_mode_is_refused(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    loss = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, num_steps=3, compile=True).loss
    net.eval()
    with pytest.raises(RuntimeError, match="switched between train, eval"):
        loss.backward()


def test_without_a_compiler(
    net: nn.Module, lslr: mpp.LSLR, tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: broken)
    expected = outcome(net, lslr, tasks)
    with pytest.warns(UserWarning, match=r"\(No working C\+\+ compiler found\).*install"):
        found = outcome(net, lslr, tasks, compile=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")  # what the compiler says is not this package's
def test_really_compiled(net: nn.Module, lslr: mpp.LSLR, tasks: Any) -> None:
    expected = outcome(net, lslr, tasks, chunk_size=1, all_step_losses=False)
    found = outcome(net, lslr, tasks, chunk_size=1, all_step_losses=False, compile=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
