"""What does adapting to a task cost? Five inner steps and the target forward, no meta-backward.

make bench-pytest ARGS='benchmarks/test_adaptation.py -k "MLP"'
"""

from __future__ import annotations

from typing import Any

from cases import adaptation, every_case, iteration, timed


@every_case
def test_adaptation(benchmark: Any, problem: str, order: str, learner: str, loop: str) -> None:
    timed(benchmark, adaptation(iteration(problem, order, learner, loop)), problem, order)
