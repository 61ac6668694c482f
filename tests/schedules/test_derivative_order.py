"""First order for so many epochs, second order from then on."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mamlpp_ext as mpp


@pytest.mark.parametrize("first_order_epochs", [0, 1, 3])
def test_order_by_epoch(first_order_epochs: int) -> None:
    da, orders = mpp.DerivativeOrderAnnealing(first_order_epochs), []
    for epoch in range(5):
        assert da.last_epoch == epoch
        orders.append(da.second_order)
        da.step()
    assert orders == [epoch >= first_order_epochs for epoch in range(5)]
    assert type(da.second_order) is bool


def test_asking_does_not_advance() -> None:
    da = mpp.DerivativeOrderAnnealing(1)
    assert [da.second_order for _ in range(3)] == [False] * 3


def test_state_dict() -> None:
    one, two = mpp.DerivativeOrderAnnealing(3), mpp.DerivativeOrderAnnealing(50)
    one.step()
    one.step()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (two.last_epoch, two.first_order_epochs, two.second_order) == (2, 3, False)
    two.step()
    assert two.second_order
    assert not one.second_order


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"last_epoch": 2},
        {"last_epoch": 2, "first_order_epochs": 1, "num_steps": 5},
        {"last_epoch": -1, "first_order_epochs": 1},
        {"last_epoch": True, "first_order_epochs": 1},
        mpp.MultiStepLoss(2, 3).state_dict(),
    ],
    ids=["empty", "missing", "unknown", "negative", "bool", "another schedule's"],
)
def test_bad_state_changes_nothing(state: dict[str, Any]) -> None:
    da = mpp.DerivativeOrderAnnealing(3)
    before = da.state_dict()
    with pytest.raises((ValueError, TypeError)):
        da.load_state_dict(state)
    assert da.state_dict() == before
