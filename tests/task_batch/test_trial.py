"""Whether tasks at once compute what each does alone: a kink is no wrong rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.torch_private import transforms_active

pytestmark = pytest.mark.usefixtures("float64")


class AtKink(nn.Module):
    """A model at the kink of a ReLU, where a vmap comes to stand on its other side.

    Args:
        everywhere: whether the vmap computes something else wherever the weights are.
    """

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.layer, self.everywhere = nn.Linear(3, 2), everywhere
        self.register_buffer("before", self.layer.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rounding = 1e-12 if transforms_active() else 0.0
        scale = 1.5 if self.everywhere and transforms_active() else 1.0
        kink = F.relu(x.abs() @ (self.layer.weight - self.before).T + rounding)
        return self.layer(x) + scale * kink


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_kink_is_told_from_a_wrong_rule(everywhere: bool, second_order: bool) -> None:
    net = AtKink(everywhere)
    batch = (torch.randn(3, 4, 3), torch.randn(3, 4, 2)) * 2
    how = {"num_steps": 2, "second_order": second_order}
    if everywhere:
        with pytest.raises(RuntimeError, match="computes something else than each alone"):
            mpp.task_batch_loss(net, mpp.LSLR(net, 2), batch, F.mse_loss, **how)
    else:
        mpp.task_batch_loss(net, mpp.LSLR(net, 2), batch, F.mse_loss, **how).loss.backward()
