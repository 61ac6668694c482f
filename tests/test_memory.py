"""Memory does not grow with the iterations, in any backend.

GROWTH_ITERATIONS=500 makes the quick run the long one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import growth

ITERATIONS = int(os.environ.get("GROWTH_ITERATIONS", "150"))
Held = dict[str, int]

if not Path("/proc/self/statm").exists():
    pytest.skip("needs Linux, which says what is resident", allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Held]]:
    """What each backend holds after 50 iterations and at the end, in a process of its own."""
    run = subprocess.run(
        [sys.executable, growth.__file__, str(ITERATIONS)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


def growths(early: Held, late: Held) -> set[str]:
    """Returns in what it grew (or shrank): exactly for tensors, by 2 % for what is resident."""
    grown = {name for name in ("tensors", "bytes") if late[name] != early[name]}
    apart = abs(late["resident"] - early["resident"])
    return grown | ({"resident"} if apart > 0.02 * early["resident"] else set())


@pytest.mark.parametrize("backend", growth.BACKENDS)
def test_memory_does_not_grow(found: dict[str, list[Held]], backend: str) -> None:
    early, late = found[backend]
    assert early["tensors"] > 10
    assert growths(early, late) == set(), (early, late)


@pytest.mark.parametrize(
    ("leak", "seen"), [("leaked loss", {"tensors", "bytes"}), ("leaked graph", {"resident"})]
)
def test_a_leak_would_be_seen(found: dict[str, list[Held]], leak: str, seen: set[str]) -> None:
    assert growths(*found[leak]) >= seen
