"""The tests at both ends of the supported versions: ``pip install nox``, then ``nox``.

Each session skips a Python that is not installed. ``make test`` tests the pinned versions.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
# What the documentation needs is left out, and what trains for long.
LEFT_OUT = ("test_ablation", "test_docs", "test_examples", "test_guides")
TESTS = sorted(str(path) for path in Path("tests").rglob("test_*.py") if path.stem not in LEFT_OUT)


@nox.session
@nox.parametrize(
    ("python", "torch"),
    [("3.10", "==2.6.*"), ("3.13", ">=2.6,<3")],
    ids=["lowest", "highest"],
)
def tests(session: nox.Session, torch: str) -> None:
    """The tests of the package, without those of the examples and of the documentation."""
    session.install(f"torch{torch}", "hypothesis", "-e", ".[examples,bench]")
    session.run("pytest", "mamlpp_ext", *TESTS, *session.posargs)
