"""What does one inner step cost? Support forward, gradient and update, and one target forward.

make bench-pytest ARGS='benchmarks/test_inner_step.py -k "Conv4-64 and 5-way"'
"""

from __future__ import annotations

from typing import Any

from cases import adaptation, every_case, iteration, timed


@every_case
def test_inner_step(benchmark: Any, problem: str, order: str, learner: str, loop: str) -> None:
    run = adaptation(iteration(problem, order, learner, loop, steps=1))
    timed(benchmark, run, problem, order)
