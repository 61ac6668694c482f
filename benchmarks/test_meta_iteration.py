"""What does a meta-iteration cost? Adaptation, meta-backward and Adam's step.

Two tasks, ResNet-12: one.

    make bench-pytest ARGS='benchmarks/test_meta_iteration.py -k "20-way and second"'
"""

from __future__ import annotations

from typing import Any

from cases import every_case, iteration, timed


@every_case
def test_meta_iteration(benchmark: Any, problem: str, order: str, learner: str, loop: str) -> None:
    tasks = 1 if problem == "ResNet-12" else 2
    timed(benchmark, iteration(problem, order, learner, loop, tasks=tasks), problem, order)
