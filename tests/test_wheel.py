"""What is released: the wheel alone, in a place of its own, and the sdist.

A user's project with the wheel type-checks under the strictest settings of mypy and pyright.
"""

from __future__ import annotations

import configparser
import email
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch

import mamlpp_ext
from test_main import MODELS

pytest.importorskip("build")

ROOT = Path(__file__).parents[1]
SCRIPT = "mamlpp-ext"
PROJECT = ROOT / "tests" / "typed"
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".venv", ".nox", ".*_cache", ".hypothesis", ".benchmarks", "*.egg-info"),
    *("__pycache__", "build", "dist", "demo", "ablation", "_build", "auto_gallery", ".coverage*"),
)


def run(command: Sequence[str | Path], where: Path) -> tuple[int, str, str]:
    """Runs it elsewhere, without what the tests have put into the environment."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    kept["PYRIGHT_PYTHON_IGNORE_WARNINGS"] = "1"  # or it asks whether there is a newer one
    done = subprocess.run(
        [*map(str, command)],
        cwd=where,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the sources."""
    source, found = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--no-isolation", "-w", "-s", "-o", str(found), "."]
    code, _, said = run(command, source)
    assert code == 0, said
    return found


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    (found,) = released.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, in which torch and the peers are found, but no checkout."""
    folder = tmp_path_factory.mktemp("place") / "venv"
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    packages = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (Path(paths["purelib"]) / "others.pth").write_text("\n".join(packages))
    install = ["install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    python = Path(paths["scripts"]) / Path(sys.executable).name
    code, _, said = run([sys.executable, "-m", "pip", "--python", python, *install], folder)
    assert code == 0, said
    return python


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with models and nothing else."""
    (tmp_path / "my_models.py").write_text(MODELS)
    return tmp_path


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(files.read(name).decode())


def test_the_wheel_has_the_package_alone(wheel: Path) -> None:
    assert wheel.name == f"mamlpp_ext-{mamlpp_ext.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 200_000
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    package = ROOT / "mamlpp_ext"
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    info = f"mamlpp_ext-{mamlpp_ext.__version__}.dist-info"
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert names == modules | {"mamlpp_ext/py.typed"} | {f"{info}/{name}" for name in about}


def test_what_pip_reads(wheel: Path) -> None:
    found = metadata(wheel)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert found["Name"] == "mamlpp_ext"
    assert found["Version"] == mamlpp_ext.__version__
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Description-Content-Type"] == "text/markdown"
    needed = [text for text in found.get_all("Requires-Dist") or [] if "extra ==" not in text]
    assert needed == ["torch>=2.6", "numpy"]
    assert set(found.get_all("Provides-Extra") or []) == set(setup["options.extras_require"])
    assert found.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


def test_twine_accepts_both(released: Path) -> None:
    pytest.importorskip("twine")
    files = sorted(map(str, released.iterdir()))
    assert len(files) == 2
    code, said, _ = run([sys.executable, "-m", "twine", "check", "--strict", *files], released)
    assert code == 0, said
    assert said.count("PASSED") == 2


def test_the_sdist_has_what_its_tests_need(released: Path) -> None:
    (path,) = released.glob("*.tar.gz")
    with tarfile.open(path) as files:
        names = {name.partition("/")[2] for name in files.getnames() if name.count("/")}
    there = {
        file.relative_to(ROOT).as_posix()
        for folder in ("mamlpp_ext", "tests", "docs", "benchmarks")
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and not NOT_SOURCE("", file.relative_to(ROOT).parts)
    }
    there |= {"Makefile", "README.md", "CHANGELOG.md", "constraints.txt", "setup.cfg", ".ci/run"}
    there |= {"noxfile.py", "pyproject.toml", "setup.py", "MANIFEST.in"}
    assert there - names == set()


def test_it_is_imported_from_the_wheel_in_silence(place: Path, elsewhere: Path) -> None:
    code = "import mamlpp_ext; print(mamlpp_ext.__file__, mamlpp_ext.__version__)"
    done, said, errors = run([place, "-W", "error", "-c", code], elsewhere)
    assert (done, errors) == (0, "")
    assert said.startswith(str(place.parents[1]))
    assert said.split()[1] == mamlpp_ext.__version__


def test_check_from_the_wheel(place: Path, elsewhere: Path) -> None:
    code, said, errors = run([place.parent / SCRIPT, "check", "my_models:make_model"], elsewhere)
    assert (code, errors) == (0, "")
    assert "rates: 20, 4 tensors times 5 steps" in said
    by_module = [place, "-m", "mamlpp_ext", "check", "my_models:make_model"]
    assert run(by_module, elsewhere) == (0, said, "")


def test_benchmark_from_the_wheel(place: Path, elsewhere: Path) -> None:
    """That it runs to its end is in nox: it takes a minute."""
    command = [place.parent / SCRIPT, "benchmark", "my_models:Pair", "--shape=3"]
    code, _, errors = run(command, elsewhere)
    assert code == 2
    assert "the model returned a tuple" in errors


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the user's project: no setup.cfg of ours above it."""
    folder = tmp_path_factory.mktemp("project") / "typed"
    shutil.copytree(PROJECT, folder, ignore=NOT_SOURCE)
    return folder


def checker(name: str, place: Path) -> list[str | Path]:
    """The command that checks the folder it is run in, with the packages of ``place``."""
    if name == "mypy":
        return [sys.executable, "-m", "mypy", "--python-executable", place, "."]
    return [sys.executable, "-m", "pyright", "--pythonpath", place, "-p", "."]


def test_mypy_strict(project: Path, place: Path) -> None:
    pytest.importorskip("mypy")
    code, said, _ = run(checker("mypy", place), project)
    assert code == 0, said
    assert "Success: no issues found in 3 source files" in said


def test_pyright_strict(project: Path, place: Path) -> None:
    pytest.importorskip("pyright")
    code, said, _ = run(checker("pyright", place), project)
    assert code == 0, said
    assert "0 errors" in said


def test_no_ignores_are_needed(project: Path, place: Path) -> None:
    """And the checkers do see the package's types: a wrong argument is found by both."""
    pytest.importorskip("pyright")
    for path in project.glob("*.py"):
        assert "ignore" not in path.read_text(encoding="utf-8")
    wrong = project / "wrong.py"
    wrong.write_text("import mamlpp_ext\n\nmamlpp_ext.MultiStepLoss('5', 1)\n")
    for name in ("mypy", "pyright"):
        code, said, _ = run(checker(name, place), project)
        assert code == 1
        assert "wrong.py:3:" in said
        assert "1 error" in said
    wrong.unlink()


@pytest.mark.parametrize("name", ["with_higher", "with_torchopt", "with_torch_func"])
def test_the_typed_project_runs(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    for peer in ("higher", "torchopt"):
        pytest.importorskip(peer)
    monkeypatch.syspath_prepend(PROJECT)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    if name == "with_higher":
        findings = module.main(tmp_path)
        assert len([text for text in findings if text.startswith("on: ")]) == 6
    elif name == "with_torchopt":
        assert any(text.startswith("problem: ") for text in module.main())
    else:
        assert module.main() > 0
