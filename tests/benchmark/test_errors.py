"""What the benchmark of a model of one's own refuses."""

from __future__ import annotations

import os
import time
from unittest import mock

import pytest
import torch

from error_tables import Net, Pair, Row, Table, checked, done_to, per_step
from mamlpp_ext.benchmark import measure
from mamlpp_ext.benchmark.question import Question, check_logits

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
TABLE: Table = done_to(per_step, QUESTIONS)
test_bad_input = checked(TABLE)
