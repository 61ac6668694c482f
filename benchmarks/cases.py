"""The cases that the pytest-benchmark files time: every loop, learner, order and problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mamlpp_ext.benchmark.loops import LEARNERS, MetaIteration, available_loops
from problems import PROBLEMS

# Rematerialisation is asked about in compare.py.
CASES = [
    pytest.param(problem, order, learner, loop, id=f"{problem}-{order}-{learner}-{loop}")
    for problem in PROBLEMS
    for order in ("second", "first")
    for loop in available_loops()
    if loop != "rematerialised"
    for learner in LEARNERS
]
every_case = pytest.mark.parametrize(("problem", "order", "learner", "loop"), CASES)


def iteration(problem: str, order: str, learner: str, loop: str, **changes: Any) -> MetaIteration:
    """Returns the meta-iteration of a case, on one task if nothing else is asked for."""
    question = replace(
        PROBLEMS[problem], **{"second_order": order == "second", "tasks": 1, **changes}
    )
    return question.iteration(question.prepare(), learner, loop)


def adaptation(one: MetaIteration) -> Callable[[], torch.Tensor]:
    """Returns what adapts to the first task and computes its target loss, and stops there."""
    if one.meta_loss is not None:
        meta_loss, order = one.meta_loss, one.learner.second_order
        return lambda: meta_loss(*one.batch, second_order=order).loss
    task_loss, task = one.task_loss, [part[0] for part in one.batch]
    return lambda: task_loss(*task).loss


def timed(benchmark: Any, run: Callable[[], object], problem: str, order: str) -> None:
    """Times ``run`` in the group of its problem and order."""
    benchmark.group = f"{problem}, {order} order"
    benchmark.pedantic(run, rounds=3 if problem == "ResNet-12" else 7, warmup_rounds=1)
