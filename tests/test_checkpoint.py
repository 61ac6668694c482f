"""What was saved before the package moved into its rooms loads, and training goes on from there."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mamlpp_ext as mpp

# Made by version 0.1.0: the states of a model in training, its tasks, and the loss that came next.
FILE = Path(__file__).parent / "data" / "checkpoint_0.1.0.pt"


def test_a_checkpoint_of_the_first_version() -> None:
    saved = torch.load(FILE, weights_only=True)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = mpp.convert_batchnorm(nn.Sequential(*layers, nn.Linear(12, 2)).double(), 3)
    lslr = mpp.LSLR(net, 3)
    msl, da = mpp.MultiStepLoss(3, 4), mpp.DerivativeOrderAnnealing(1)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()], 1e-2)
    parts = {"net": net, "lslr": lslr, "msl": msl, "da": da, "opt": meta_opt}
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    assert (msl.last_epoch, da.second_order) == (2, True)
    x, y = saved["x"], saved["y"]
    result = mpp.task_batch_loss(
        net,
        lslr,
        (x, y, x.flip(1), y.flip(1)),
        F.cross_entropy,
        num_steps=3,
        aggregate=msl,
        second_order=da.second_order,
    )
    torch.testing.assert_close(result.loss, saved["next_loss"], rtol=1e-12, atol=0)
