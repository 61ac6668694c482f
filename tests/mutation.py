"""Changes the package in small ways, one at a time, and lists the changes that no test notices.

    python -m venv mutation && mutation/bin/pip install cosmic-ray==8.7.0
    python tests/mutation.py mutation/bin [lslr.rates norm.base ...]

The Python that runs this runs the tests, on a copy of the package. docs/reliability.md says why
each survivor is harmless.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 120  # seconds for the tests of one change
# The tests that could notice, by module; the quickest to notice first.
TESTS = {
    "schedules.derivative_order": "schedules/derivative_order schedules/multi_step_loss "
    "schedules/errors",
    "schedules.epochs": "schedules/derivative_order schedules/multi_step_loss",
    "schedules.multi_step_loss": "schedules/multi_step_loss schedules/errors task_batch/errors",
    "lslr.rates": "lslr/rates lslr/errors integrations/errors integrations/higher "
    "integrations/torchopt check_setup",
    "norm.base": "norm/batch_norm norm/errors norm/convert steps",
    "norm.running_statistics": "norm/batch_norm norm/errors norm/convert steps task_batch/loss",
}
# What tests import, but for the package: most of their time.
PRELOADED = "higher hypothesis pytest torchopt torch._dynamo torch.distributed.tensor"
# Excluded: changes of annotations, which are never evaluated, and operators that no slip would
# write for another.
CONFIG = """
[cosmic-ray]
module-path = "{path}"
timeout = {limit}
test-command = "{python} -S -c '{ask}' {module}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = [
    "core/ReplaceBinaryOperator_BitOr_.*",
    "core/ReplaceBinaryOperator_.*_(Mod|Pow|LShift|RShift|BitOr|BitAnd|BitXor)",
]
"""
# In place of the tests themselves: asks the process that has torch imported already to run them.
ASK = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(str(0)); "
    "s.send(sys.argv[1].encode()); sys.exit(int(s.recv(9) or 1))"
)


def path_of(module: str) -> str:
    return f"mamlpp_ext/{module.replace('.', '/')}.py"


@contextlib.contextmanager
def tester(where: Path) -> Iterator[None]:
    """Answers every ``ASK`` in the folder ``where`` with the exit status of the tests."""
    for heavy in PRELOADED.split():
        importlib.import_module(heavy)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(where / "0"))
    listening.listen()
    server = os.fork()
    while not server:
        asking, _ = listening.accept()
        child = os.fork()
        if not child:
            run_tests(where, asking)
        asking.close()
        os.waitpid(child, 0)
    try:
        yield
    finally:
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)


def run_tests(where: Path, asking: socket.socket) -> None:
    import pytest

    signal.alarm(LIMIT)
    os.chdir(where)
    sys.path.insert(0, str(where))  # before the package that is installed
    module = asking.recv(99).decode()
    names = (name.rpartition("/") for name in TESTS[module].split())
    tests = [*(f"tests/{room}/test_{name}.py" for room, _, name in names), path_of(module)]
    again = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that the last file had imported
    without = ("cacheprovider", "benchmark", "hypothesispytest")
    options = ["-x", "-q", "-W", again, *(f"-pno:{plugin}" for plugin in without)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)  # a module without doctests
        failed = any(pytest.main([*options, file]) not in fine for file in tests)
    asking.send(str(int(failed)).encode())
    os._exit(0)


def survivors(tools: Path, module: str, where: Path) -> tuple[int, list[str]]:
    """Returns how many changes were tried on ``module`` and those that no test noticed."""
    config, session = where / f"{module}.toml", where / f"{module}.sqlite"
    settings = {"module": module, "path": path_of(module), "limit": LIMIT + 5.0, "ask": ASK}
    config.write_text(CONFIG.format(**settings, python=sys.executable))

    def call(tool: str, *arguments: Path | str) -> list[str]:
        command = [tools / tool, *arguments]
        done = subprocess.run(command, cwd=where, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()

    call("cosmic-ray", "baseline", config)  # the tests must pass before anything is changed
    call("cosmic-ray", "init", config, session)
    call("cr-filter-operators", session, config)
    call("cosmic-ray", "exec", config, session)
    results = [json.loads(line)[1] for line in call("cosmic-ray", "dump", session)]
    tried = [result for result in results if result["worker_outcome"] != "skipped"]
    return len(tried), [r["diff"] for r in tried if r["test_outcome"] != "killed"]


def main() -> None:
    tools, modules = Path(sys.argv[1]).absolute(), sys.argv[2:] or list(TESTS)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        for part in ("mamlpp_ext", "tests"):
            shutil.copytree(ROOT / part, where / part)
        shutil.copy(ROOT / "setup.cfg", where)
        with tester(where):
            for module in modules:
                tried, left = survivors(tools, module, where)
                lines = [f"{module}: {tried} changes, {len(left)} unnoticed", *left]
                print(*lines, sep="\n", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
