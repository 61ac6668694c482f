"""The guide of per-step LayerNorm: both scripts run, little changes, and the gradient is right."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

import guide_diff
import mamlpp_ext as mpp
from any_model import TASKS, assert_same, by_higher, outcome, written_out
from guide import WAYS
from small_models import conv_next


@pytest.mark.parametrize("which", ["before", "after"])
def test_both_run(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"maml_layer_norm_{which}")
    # Of five classes: by chance a fifth.
    assert 0.3 < script.main(epochs=1, iterations=1, tests=2) < 1
    assert "epoch 0: accuracy" in capsys.readouterr().out


def test_few_lines_change() -> None:
    added, removed = guide_diff.count(guide_diff.changes("layer_norm"))
    assert 0 < added <= 12
    assert 0 < removed <= 12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("second_order", [True, False])
def test_what_it_shows_is_the_plain_loop(second_order: bool) -> None:
    torch.manual_seed(0)
    net = mpp.convert_norm(conv_next(WAYS, width=4), 2)
    x, y = torch.randn(TASKS, WAYS, 1, 8, 8), torch.arange(WAYS).expand(TASKS, -1)
    batch = (x, y, x.flip(-1), y)
    found, expected = (
        outcome(path, net, batch, F.cross_entropy, second_order=second_order)
        for path in (by_higher, written_out)
    )
    assert_same(found, expected)
    norms = [grad for name, grad in found.items() if "norm.weight" in name]
    assert len(norms) == 2
    assert all(len(grad) == 2 and grad.abs().max() > 0 for grad in norms)
