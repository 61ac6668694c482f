"""What the benchmark of a model of one's own refuses."""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mamlpp_ext.__main__ as command
from error_tables import Net, Pair, Row, Table, checked, done_to, per_step
from mamlpp_ext.benchmark import measure
from mamlpp_ext.benchmark.question import Question, check_logits
from mamlpp_ext.check_setup import named
from mamlpp_ext.check_setup.model import Trial, check_runs, loss_of_logits, noise_of

pytestmark = pytest.mark.usefixtures("float64")


def without_gpu(net: Net) -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        Question("module:model", (3,), device="cuda")


QUESTIONS: dict[str, Row] = {
    "benchmark, no task at once": (
        lambda n: Question("module:model", (20,), chunk_size=0),
        ValueError,
        ("chunk_size must be at least 1", "got 0"),
    ),
    "benchmark, two outputs": (
        lambda n: check_logits(Pair(), (torch.randn(1, 5, 3),) * 4, 2),
        TypeError,
        ("returned a tuple", "needs logits", "name a wrapper"),
    ),
    "benchmark, too few outputs": (
        lambda n: check_logits(n, (torch.randn(1, 5, 3),) * 4, 3),
        ValueError,
        ("shape (5, 2) for 5 inputs", "[5, 3 or more]", "set --ways"),
    ),
    "benchmark, channels_last without images": (
        lambda n: Question("module:model", (20,), channels_last=True),
        ValueError,
        ("channels_last is a layout of images [C, H, W]", "(20,)", "leave it out"),
    ),
    "benchmark, no GPU": (
        without_gpu,
        ValueError,
        ("device 'cuda' was asked for", "finds no GPU", "use 'cpu'"),
    ),
    "benchmark, too slow": (
        lambda n: measure.in_fresh_process(time.sleep, 60, seconds=0.01),
        TimeoutError,
        ("not done within 0.01 seconds", "allow more"),
    ),
    "benchmark, out of memory": (
        lambda n: measure.in_fresh_process(os._exit, 9, seconds=60),
        RuntimeError,
        ("exit code 9", "-9: killed", "fewer tasks or steps"),
    ),
}


def batch_of(made: Any) -> Any:
    """Reads a batch that a function of some module returns."""
    module = ModuleType("made_here")
    module.make, module.takes = (lambda: made), (lambda size: made)
    module.number = 3
    return mock.patch.dict(sys.modules, made_here=module)


def load(made: Any, name: str = "make") -> Any:
    with batch_of(made):
        return named.load_batch(f"made_here:{name}")


def load_loss(name: str) -> Any:
    with batch_of(None):
        return named.load_loss(f"made_here:{name}")


def trial(loss: Any, *, noise: bool = False, wide: int = 3) -> Trial:
    labels = torch.zeros(4, dtype=torch.long)
    return Trial((torch.randn(4, wide), labels) * 2, loss, noise)


class Named(NamedTuple):
    distance: torch.Tensor


BATCHES: dict[str, Row] = {
    "batch, neither that nor noise": (
        lambda n: Question("module:model"),
        ValueError,
        ("neither --shape nor --batch", "--shape 1,28,28", "--batch package.module:name"),
    ),
    "batch, and noise": (
        lambda n: Question("module:model", (3, 4), batch="module:batch"),
        ValueError,
        ("--shape 3,4 makes noise", "--batch module:batch", "leave one of them out"),
    ),
    "batch, a loss without it": (
        lambda n: command.make_trial("3", None, "module:loss"),
        ValueError,
        ("--loss module:loss needs labels", "only --batch has", "name the function of a batch"),
    ),
    "batch, no function": (
        lambda n: load(None, "number"),
        TypeError,
        ("--batch made_here:number is a int", "name a function without arguments", "y_target)"),
    ),
    "batch, arguments": (
        lambda n: load(None, "takes"),
        TypeError,
        ("made_here:takes takes arguments", "returns the batch", "made_here:make_batch"),
    ),
    "batch, three tensors": (
        lambda n: load((torch.zeros(2, 3),) * 3),
        ValueError,
        ("--batch made_here:make returned no meta-batch", "[(2, 3), (2, 3), (2, 3)]", "stack the"),
    ),
    "batch, a loss that is none": (
        lambda n: load_loss("number"),
        TypeError,
        ("--loss made_here:number is a int", "name a function of an output and labels"),
    ),
    "batch, no logits": (
        lambda n: loss_of_logits(Named(torch.zeros(2)), torch.zeros(2)),
        TypeError,
        ("returned a Named", "labels are a Tensor", "by --loss package.module:function"),
    ),
    "batch, labels by name": (
        lambda n: loss_of_logits(torch.zeros(2, 3), {"distance": torch.zeros(2)}),
        TypeError,
        ("returned a Tensor", "labels are a dict", "by --loss package.module:function"),
    ),
    "batch, noise for words": (
        lambda n: check_runs(nn.Embedding(3, 2), noise_of((5,))),
        ValueError,
        ("does not take noise [8, 5]", "Long", "token ids", "--batch package.module:function"),
    ),
    "batch, other inputs": (
        lambda n: check_runs(n, trial(F.cross_entropy, wide=5)),
        ValueError,
        ("does not take the x_support of --batch", "4x5", "model(**x)"),
    ),
    "batch, other labels": (
        lambda n: check_runs(n, trial(F.mse_loss)._replace(task=(torch.randn(4, 3), None) * 2)),
        ValueError,
        ("does not take the model's Tensor and the labels", "by --loss package.module:function"),
    ),
    "batch, a loss for each example": (
        lambda n: check_runs(n, trial(lambda o, y: F.cross_entropy(o, y, reduction="none"))),
        ValueError,
        ("a tensor of shape (), got (4,)", "take the mean over examples"),
    ),
    "batch, a loss in numbers": (
        lambda n: check_runs(n, trial(lambda o, y: 1.0)),
        ValueError,
        ("a tensor of shape (), got float", "take the mean over examples"),
    ),
}
TABLE: Table = {**done_to(per_step, QUESTIONS), **done_to(per_step, BATCHES)}
test_bad_input = checked(TABLE)
