"""The tests on every supported Python, at both ends of the supported versions of torch.

``pip install nox``, then ``nox``. A Python that is not installed is skipped, and nox says so.
``make test`` tests the pinned versions, and builds and checks the wheel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
# What the documentation needs is left out, and what trains for long.
LEFT_OUT = {
    *("test_ablation", "test_docs", "test_examples", "test_guides", "test_images_train"),
    *("test_layer_norm_guide", "test_soak", "test_steps_table", "test_transformers_guide"),
}
TESTS = sorted(str(path) for path in Path("tests").rglob("test_*.py") if path.stem not in LEFT_OUT)
# What an interpreter could change is in the units. Numbers are torch's: both of its ends are tried.
ROOMS = {"fast_kernels", "integrations", "lslr", "norm", "schedules", "task_batch"}
WHOLE = {"test_checkpoint", "test_first_order", "test_package", "test_parity", "test_torch_private"}
UNITS = [p for p in TESTS if Path(p).parent.name in ROOMS or Path(p).stem in WHOLE]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
# Newer than tested, torch makes the package warn; everything else that warns fails.
NEWER = "ignore:mamlpp_ext was tested with torch:UserWarning"
MODELS = """
from torch import nn

def make_model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
"""
# Without the collector: all that torch holds may be gone through in the middle of any import.
IMPORT_TIME = """
import subprocess, sys

code = (
    "import gc, time, torch; gc.disable(); begin = time.process_time(); "
    "import mamlpp_ext; print(time.process_time() - begin)"
)
command = [sys.executable, "-c", code]
runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(9)]
added = min(1000 * float(run.stdout) for run in runs)  # others may slow the machine down
print(f"import mamlpp_ext adds {added:.0f} ms to import torch")
sys.exit(added > 50)
"""


@nox.session
@nox.parametrize(
    ("python", "torch"),
    [("3.10", "==2.6.*"), ("3.11", "==2.13.*"), ("3.14", ">=2.6")],
    ids=["lowest", "pinned", "newest"],
)
def tests(session: nox.Session, torch: str) -> None:
    """The tests of the package, without those of the examples and of the documentation."""
    _pytest(session, torch, "mamlpp_ext", *TESTS)


@nox.session(python=PYTHONS)
def units(session: nox.Session) -> None:
    """The tests of the rooms, and of the loops against each other, with the newest torch."""
    _pytest(session, ">=2.6", *UNITS)


def _pytest(session: nox.Session, torch: str, *tests: str) -> None:
    tools = "build", "hypothesis", "pytest-xdist", "setuptools>=77"
    session.install(f"torch{torch}", *tools, "-e", ".[examples,bench]")
    how = "-n", "auto", "--dist", "loadfile", "-W", NEWER
    session.run("pytest", *how, *tests, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """The wheel alone in an empty environment, from another directory: both commands, imports."""
    folder = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder))
    session.run("python", "-m", "pip", "uninstall", "-y", "build", silent=True)
    session.install(str(max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)))
    (folder / "my_models.py").write_text(MODELS)
    session.chdir(folder)
    question = ("my_models:make_model", "--shape", "1,8,8")
    for command in (("mamlpp-ext",), ("python", "-m", "mamlpp_ext")):
        session.run(*command, "check", *question)
    session.run("mamlpp-ext", "benchmark", *question, "--repeats", "2", "--tasks", "2")
    session.run("python", "-c", IMPORT_TIME)


@nox.session(python="3.11")
def sdist(session: nox.Session) -> None:
    """The sdist unpacked somewhere else, by its own tests and those of the documentation."""
    folder = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder))
    newest = max(folder.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)
    shutil.unpack_archive(newest, folder)
    session.chdir(folder / newest.name.removesuffix(".tar.gz"))
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("pytest", *session.posargs)
