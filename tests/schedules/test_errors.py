"""What the schedules and the aggregators of step losses refuse."""

from __future__ import annotations

import math

import pytest
import torch

import mamlpp_ext as mpp
from error_tables import Row, Table, checked, done_to, per_step

pytestmark = pytest.mark.usefixtures("float64")

msl, one = mpp.MultiStepLoss, torch.ones(())


COUNTS: dict[str, Row] = {
    "weights of 0 steps": (
        lambda n: mpp.multi_step_loss_weights(0, 0, 10),
        ValueError,
        ("num_steps", "at least 1", "got 0"),
    ),
    "weights at epoch -1": (
        lambda n: mpp.multi_step_loss_weights(5, -1, 10),
        ValueError,
        ("epoch", "at least 0", "got -1"),
    ),
    "weights at epoch 0.5": (
        lambda n: mpp.multi_step_loss_weights(5, 0.5, 10),
        TypeError,
        ("epoch", "got 0.5", "pass an int"),
    ),
    "annealed over -1 epochs": (lambda n: msl(5, -1), ValueError, ("anneal_epochs", "got -1")),
    "annealed over nan epochs": (lambda n: msl(5, math.nan), TypeError, ("anneal_epochs", "nan")),
    "a share of 10": (
        lambda n: msl.for_run(5, 100, share=10),
        ValueError,
        ("share", "from 0 to 1", "got 10", "a tenth of the run's 100 epochs"),
    ),
    "a share of True": (
        lambda n: mpp.DerivativeOrderAnnealing.for_run(100, True),
        ValueError,
        ("share", "got True"),
    ),
    "a run of 0 epochs": (
        lambda n: mpp.DerivativeOrderAnnealing.for_run(0),
        ValueError,
        ("run_epochs", "at least 1", "got 0"),
    ),
    "order for -1 epochs": (
        lambda n: mpp.DerivativeOrderAnnealing(-1),
        ValueError,
        ("first_order_epochs", "at least 0", "got -1"),
    ),
    "order for True epochs": (
        lambda n: mpp.DerivativeOrderAnnealing(True),
        TypeError,
        ("first_order_epochs", "got True", "pass an int"),
    ),
}
LOSSES: dict[str, Row] = {
    "too few": (
        lambda n: msl(3, 10)([one, one]),
        ValueError,
        ("must hold 3 losses", "got 2", "after every update"),
    ),
    "too many": (lambda n: msl(3, 10)([one] * 4), ValueError, ("must hold 3 losses", "got 4")),
    "too few in a tensor": (lambda n: msl(3, 10)(torch.ones(4, 2)), ValueError, ("3", "got 2")),
    "none": (lambda n: mpp.FinalStepLoss()([]), ValueError, ("at least one", "got 0")),
    "floats": (
        lambda n: msl(2, 10)([one, 0.5]),
        TypeError,
        ("one tensor for each inner step", "got 0.5 of type float", "not loss.item()"),
    ),
    "one float": (
        lambda n: msl(1, 10)(0.5),
        TypeError,
        ("step_losses", "tensor", "got 0.5", "not loss.item()"),
    ),
    "one vector among them": (
        lambda n: msl(2, 10)([one, torch.ones(3)]),
        ValueError,
        ("step_losses", "(3,)"),
    ),
    "None where a loss counts": (
        lambda n: msl(3, 10)([one, None, one]),
        TypeError,
        ("step_losses[1] is None", "counts at this epoch", "counts(step) is False"),
    ),
    "None at the final step": (
        lambda n: mpp.FinalStepLoss()([one, None]),
        TypeError,
        ("step_losses[1] is None", "not for step 1"),
    ),
    "counts at step -1": (lambda n: msl(3, 10).counts(-1), ValueError, ("step", "got -1")),
    "final loss of 0 steps": (
        lambda n: mpp.FinalStepLoss(0),
        ValueError,
        ("num_steps", "at least 1", "got 0"),
    ),
    "state of other steps": (
        lambda n: msl(3, 10).load_state_dict(msl(5, 10).state_dict()),
        ValueError,
        ("num_steps=3", "num_steps=5", "build it with the latter"),
    ),
    "state of another schedule": (
        lambda n: msl(3, 10).load_state_dict(mpp.FinalStepLoss().state_dict()),
        ValueError,
        ("'anneal_epochs', 'last_epoch', 'num_steps'", "got ['last_epoch']", "state_dict()"),
    ),
    "state at epoch 1.5": (
        lambda n: mpp.FinalStepLoss().load_state_dict({"last_epoch": 1.5}),
        TypeError,
        ("last_epoch", "got 1.5"),
    ),
    "state at epoch -1": (
        lambda n: mpp.DerivativeOrderAnnealing(3).load_state_dict(
            {"first_order_epochs": 3, "last_epoch": -1}
        ),
        ValueError,
        ("last_epoch", "at least 0", "got -1"),
    ),
}
TABLE: Table = {**done_to(per_step, COUNTS), **done_to(per_step, LOSSES, prefix="losses: ")}
test_bad_input = checked(TABLE)
