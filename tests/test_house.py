"""The rooms of the package: how large they are, and which may import which."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mamlpp_ext

PACKAGE = Path(mamlpp_ext.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yields each function's name and its lines, without those of its docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[0]
            words = first.end_lineno - first.lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - words


def test_the_package_is_seen_at_a_glance() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 14


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250
    long = {name: lines for name, lines in functions(path) if lines > 40}
    assert long == {}


@pytest.mark.parametrize("room", [path.parent for path in FILES if path.name == "__init__.py"])
def test_every_room_says_what_it_is_for(room: Path) -> None:
    words = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
    assert words
    assert len(words.splitlines()[0]) > 30


def contracts(root: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    flags = ["--no-cache", "--no-logo"]
    return subprocess.run([*command, *flags], cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts somewhere else, to be broken."""
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / "mamlpp_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_imports_point_downwards(copy: Path) -> None:
    run = contracts(copy)
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("lslr/rates.py", "import higher", "The core imports torch alone"),
        (
            "norm/convert_batch_norm.py",
            "import mamlpp_ext.integrations.higher",
            "Imports point downwards",
        ),
        ("checks.py", "from mamlpp_ext.steps import inner_steps", "Imports point downwards"),
        (
            "norm/base.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from mamlpp_ext.norm.batch_norm import PerStepBatchNorm1d",
            "No file imports another in a circle",
        ),
        (
            "check_setup/wiring.py",
            "from mamlpp_ext.lslr.rates import LSLR as Rates",
            "What the room lslr does not hand on",
        ),
    ],
)
def test_an_import_that_points_elsewhere_is_found(copy, path, line, broken) -> None:
    file = copy / "mamlpp_ext" / path
    file.write_text(file.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    run = contracts(copy)
    assert run.returncode == 1
    found = [row for row in run.stdout.splitlines() if row.endswith("BROKEN")]
    assert any(row.startswith(broken) for row in found), run.stdout
