"""The weights of the steps' losses over the epochs, and what adds the losses up."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS = [(k, e) for k in (1, 2, 3, 5, 10) for e in (1, 4, 15, 200)]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ((5, 0, 10), [0.2, 0.2, 0.2, 0.2, 0.2]),
        ((5, 5, 10), [0.1, 0.1, 0.1, 0.1, 0.6]),
        ((5, 9, 10), [0.02, 0.02, 0.02, 0.02, 0.92]),
        ((5, 99, 100), [0.006, 0.006, 0.006, 0.006, 0.976]),  # the floor of 0.03 / K
        ((4, 2, 3), [1 / 12, 1 / 12, 1 / 12, 3 / 4]),
        ((5, 10, 10), [0.0, 0.0, 0.0, 0.0, 1.0]),
        ((5, 11, 10), [0.0, 0.0, 0.0, 0.0, 1.0]),
        ((2, 0, 0), [0.0, 1.0]),
        ((1, 3, 10), [1.0]),
    ],
)
def test_weights_by_hand(settings: tuple[int, int, int], weights: list[float]) -> None:
    found = mpp.multi_step_loss_weights(*settings)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(("steps", "anneal"), SETTINGS)
def test_weights_over_the_epochs(steps: int, anneal: int) -> None:
    table = torch.stack(
        [mpp.multi_step_loss_weights(steps, epoch, anneal) for epoch in range(anneal + 2)]
    )
    torch.testing.assert_close(table.sum(1), torch.ones(anneal + 2))
    torch.testing.assert_close(table[0], torch.full((steps,), 1 / steps))
    assert (table[:anneal] > 0).all()  # every step counts until the annealing is over ...
    final = torch.eye(steps)[-1].expand(2, -1)
    torch.testing.assert_close(table[anneal:], final)  # ... and from then on the last alone
    assert (table.diff(dim=0)[:, :-1] <= 0).all()
    assert (table.diff(dim=0)[:, -1] >= -1e-15).all()


@pytest.mark.parametrize("settings", [(0, 0, 1), (2, -1, 1), (2, 0, -1)])
def test_weights_of_what_is_out_of_range(settings: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        mpp.multi_step_loss_weights(*settings)


@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_total_is_the_weighted_sum(epoch: int) -> None:
    msl = mpp.MultiStepLoss(3, 4)
    for _ in range(epoch):
        msl.step()
    weights = mpp.multi_step_loss_weights(3, epoch, 4)
    torch.testing.assert_close(msl.weights, weights)
    losses = torch.randn(2, 4, 3)
    torch.testing.assert_close(msl(losses), losses @ weights)
    torch.testing.assert_close(msl(losses[0, 0]), losses[0, 0] @ weights)
    for sequence in (list(losses[0, 0]), tuple(losses[0, 0])):
        torch.testing.assert_close(msl(sequence), losses[0, 0] @ weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_is_that_of_the_losses(dtype: torch.dtype) -> None:
    assert mpp.MultiStepLoss(2, 3)(torch.ones(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "sequence"])
def test_steps_of_weight_zero_get_no_gradient(as_tensor: bool) -> None:
    losses = [torch.ones((), requires_grad=True) for _ in range(3)]
    diverged = losses[0] / 0  # infinite, and so would be 0 times its gradient
    given: Any = [diverged * 0, *losses[1:]]
    total = mpp.MultiStepLoss(3, 0)(torch.stack(given) if as_tensor else given)
    total.backward()
    assert total == 1
    assert losses[2].grad == 1
    if not as_tensor:
        assert losses[0].grad is losses[1].grad is None


def test_gradients_are_the_weights() -> None:
    msl, losses = mpp.MultiStepLoss(3, 4), torch.randn(5, 3, requires_grad=True)
    msl.step()
    msl(losses).sum().backward()
    torch.testing.assert_close(losses.grad, msl.weights.expand(5, 3))


def test_final_step_loss() -> None:
    final = mpp.FinalStepLoss()
    losses = torch.randn(2, 3)
    torch.testing.assert_close(final(losses), losses[:, -1])
    torch.testing.assert_close(final(list(losses[0])), losses[0, -1])
    torch.testing.assert_close(final([losses[0, 0]]), losses[0, 0])
    before = mpp.MultiStepLoss(3, 0)
    torch.testing.assert_close(final(losses), before(losses))  # an annealing that is over


@pytest.mark.parametrize(
    "build", [lambda: mpp.MultiStepLoss(3, 10), mpp.FinalStepLoss], ids=["msl", "final"]
)
def test_state_dict(build: Any) -> None:
    one, two, losses = build(), build(), torch.randn(3)
    for _ in range(4):
        one.step()
    state = json.loads(json.dumps(one.state_dict()))  # plain numbers, for any checkpoint format
    two.load_state_dict(state)
    assert two.last_epoch == one.last_epoch == 4
    torch.testing.assert_close(two(losses), one(losses))
    kept = one.state_dict()
    two.load_state_dict(kept)
    one.step()
    assert two.last_epoch == kept["last_epoch"] == 4  # nothing is shared


def test_settings_travel_in_the_state_dict() -> None:
    msl = mpp.MultiStepLoss(3, 10)
    msl.load_state_dict(mpp.MultiStepLoss(3, 7).state_dict())
    assert msl.anneal_epochs == 7  # as with torch's schedulers


def test_state_of_many_steps() -> None:
    state = json.loads(json.dumps(mpp.MultiStepLoss(1000, 7).state_dict()))
    msl = mpp.MultiStepLoss(1000, 10)
    msl.load_state_dict(state)  # equal numbers, not the same object
    assert msl.anneal_epochs == 7
    torch.testing.assert_close(msl(torch.ones(1000)), torch.ones(()))


@pytest.mark.parametrize(
    "state",
    [
        {"num_steps": 4, "anneal_epochs": 7, "last_epoch": 2},
        {"num_steps": 3, "anneal_epochs": 7},
        {"num_steps": 3, "anneal_epochs": 7, "last_epoch": 2, "gamma": 1},
        {"num_steps": 3, "anneal_epochs": -1, "last_epoch": 2},
        {"num_steps": 3, "anneal_epochs": 7, "last_epoch": 2.5},
    ],
    ids=["steps", "missing", "unknown", "negative", "fractional"],
)
def test_bad_state_changes_nothing(state: dict[str, Any]) -> None:
    msl = mpp.MultiStepLoss(3, 10)
    msl.step()
    before = msl.state_dict()
    with pytest.raises((ValueError, TypeError)):
        msl.load_state_dict(state)
    assert msl.state_dict() == before


def test_beside_cosine_annealing() -> None:
    """The three schedules of a training count the same epochs when stepped side by side."""
    epochs, start, end = 6, 1e-3, 1e-5
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(()))], lr=start)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=end)
    msl, da = mpp.MultiStepLoss(2, 4), mpp.DerivativeOrderAnnealing(3)
    seen: list[tuple[float, Tensor, bool]] = []
    for epoch in range(epochs):
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(end + (start - end) * (1 + math.cos(math.pi * epoch / 6)) / 2)
        seen.append((rate, msl.weights, da.second_order))
        for _ in range(5):
            optimizer.step()  # iterations move none of them
        for schedule in (cosine, msl, da):
            schedule.step()
        assert cosine.last_epoch == msl.last_epoch == da.last_epoch == epoch + 1
    assert [order for _, _, order in seen] == [False] * 3 + [True] * 3
    finals = [weights[-1].item() for _, weights, _ in seen]
    assert finals == pytest.approx([0.5, 0.625, 0.75, 0.875, 1, 1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(end)


def test_schedules_show_their_settings() -> None:
    msl = mpp.MultiStepLoss(5, anneal_epochs=10)
    msl.step()
    assert repr(msl) == "MultiStepLoss(last_epoch=1, num_steps=5, anneal_epochs=10)"


def test_none_stands_for_what_does_not_count() -> None:
    """A loop of one's own need not compute target losses of weight 0."""
    msl, losses = mpp.MultiStepLoss(3, 1), [torch.tensor(float(i)) for i in range(3)]
    assert [msl.counts(step) for step in range(4)] == [True, True, True, False]
    whole = msl(losses)
    msl.step()
    assert [msl.counts(step) for step in range(4)] == [False, False, True, False]
    asked = [loss if msl.counts(step) else None for step, loss in enumerate(losses)]
    assert msl(asked) == msl(losses) == losses[2] != whole
    assert mpp.FinalStepLoss()([None, losses[1]]) == losses[1]
    final = mpp.FinalStepLoss(num_steps=3)
    assert [final.counts(step) for step in range(4)] == [False, False, True, False]
    assert mpp.FinalStepLoss().counts(0)  # which is the last it does not know


@pytest.mark.parametrize("epoch", range(5))
def test_counts_is_what_weights_say(epoch: int) -> None:
    msl = mpp.MultiStepLoss(4, 3)
    for _ in range(epoch):
        msl.step()
    assert [msl.counts(step) for step in range(4)] == [w > 0 for w in msl.weights.tolist()]


@pytest.mark.parametrize("build", [lambda: mpp.MultiStepLoss(2, 0), mpp.FinalStepLoss])
def test_recent_losses_are_those_of_the_last_calls(build: Any) -> None:
    msl = build()
    assert msl.recent_losses.numel() == 0
    start = torch.ones((), requires_grad=True)
    msl([start * 100, start * 100])
    for call in range(16):
        msl(torch.stack([start * call, start * 2]).expand(3, 2))
    msl([None, start * 2])
    assert msl.recent_losses.tolist() == [8.0, 2.0]  # of 1 to 15
    assert not msl.recent_losses.requires_grad
    assert "last_epoch" in repr(msl)
    assert "recent" not in f"{msl!r}{msl.state_dict()}"
    msl([None, start])
    assert copy.deepcopy(msl).recent_losses[0] == 8.5


def test_recent_losses_within_a_transform_are_not_kept() -> None:
    msl = mpp.MultiStepLoss(2, 3)
    torch.func.vmap(msl)(torch.ones(4, 2))
    assert msl.recent_losses.numel() == 0


@pytest.mark.parametrize(
    ("run", "share", "epochs"),
    [(100, 0.1, 10), (300, 0.1, 30), (19, 0.5, 10), (3, 0.1, 1), (7, 1, 7), (50, 0, 0)],
)
def test_shares_of_a_run(run: int, share: float, epochs: int) -> None:
    assert mpp.MultiStepLoss.for_run(5, run, share).state_dict() == (
        mpp.MultiStepLoss(5, epochs).state_dict()
    )
    assert mpp.DerivativeOrderAnnealing.for_run(run, share).first_order_epochs == epochs


def test_a_short_run_sees_every_part_of_its_schedules() -> None:
    """The paper's 10 and 50 epochs would end after it: the loss is annealed, the order changes."""
    run = 20
    msl, da = mpp.MultiStepLoss.for_run(5, run), mpp.DerivativeOrderAnnealing.for_run(run)
    seen = []
    for _ in range(run):
        seen.append((msl.counts(0), da.second_order))
        msl.step(), da.step()
    assert seen == [(True, False)] * 2 + [(False, True)] * 18
