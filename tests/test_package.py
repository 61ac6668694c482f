"""What is public stays importable and documented, and the core needs torch alone."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import mamlpp_ext as mpp
from mamlpp_ext import checks

ROOT = Path(__file__).parents[1]
PER_STEP = (
    "num_features num_steps eps momentum affine track_running_stats *extra_steps *device *dtype"
)
SIGNATURES = {
    "mamlpp_ext": {
        "DerivativeOrderAnnealing": "first_order_epochs",
        "FinalStepLoss": "num_steps",
        "FusedSequential": "args",
        "LSLR": "module num_steps lr *adapt *learnable *extra_steps",
        "LSLR.update": "self params grads step",
        "MultiStepLoss": "num_steps anneal_epochs",
        "PerStepBatchNorm1d": PER_STEP,
        "PerStepBatchNorm2d": PER_STEP,
        "PerStepBatchNorm3d": PER_STEP,
        "TaskBatchLoss": "model lslr loss_fn *num_steps *aggregate *rematerialize "
        "*chunk_size *all_step_losses *process_group *cuda_graph *inner_loss_fn",
        "TaskBatchResult": "loss step_losses logits",
        "at_step": "module step",
        "check_setup": "module lslr meta_optimizer *multi_step_loss *derivative_order "
        "*meta_scheduler *run_epochs",
        "convert_batchnorm": "module num_steps *extra_steps",
        "convert_norm": "module num_steps *extra_steps",
        "frozen_statistics": "module",
        "functional_call": "module params args kwargs",
        "inner_steps": "module num_steps *second_order",
        "multi_step_loss_weights": "num_steps epoch anneal_epochs",
        "per_step_parameters": "module num_steps names *extra_steps",
        "task_batch_loss": "model lslr batch loss_fn *num_steps *aggregate *second_order "
        "*rematerialize *chunk_size *all_step_losses *process_group *inner_loss_fn",
        "twice_differentiable": "module *second_order",
    },
    "mamlpp_ext.integrations.higher": {
        "DifferentiableLSLR": "other args kwargs",
        "LSLROptimizer": "module lslr second_order",
        "innerloop_ctx": "net lslr *second_order *track_higher_grads",
    },
    "mamlpp_ext.integrations.torchopt": {
        "LSLRState": "step names",
        "MetaLSLR": "net lslr second_order",
        "innerloop_ctx": "net lslr *second_order",
        "lslr_transform": "lslr",
    },
}
NAMES = [(module, name) for module, names in SIGNATURES.items() for name in names]


def public(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_signatures(module: str, name: str) -> None:
    parameters = inspect.signature(public(module, name)).parameters.values()
    shown = [("*" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters]
    assert " ".join(shown) == SIGNATURES[module][name]


@pytest.mark.parametrize("module", SIGNATURES)
def test_nothing_else_is_public(module: str) -> None:
    names = {name.partition(".")[0] for name in SIGNATURES[module]}
    assert set(importlib.import_module(module).__all__) == names


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_documentation(module: str, name: str) -> None:
    thing = public(module, name)
    text = thing.__doc__  # its own: inspect.getdoc would be content with a parent's
    assert text
    assert text.strip().splitlines()[0].endswith((".", ":"))
    if dataclasses.is_dataclass(thing) or hasattr(thing, "_fields"):  # returned, never made
        assert "Attributes:" in text
    else:
        assert "Example:" in text
        assert ">>>" in text
        for parameter in inspect.signature(thing).parameters:
            assert (
                parameter in ("self", "args", "kwargs", "other")
                or parameter in text
                or (
                    "PerStepBatchNorm1d`" in text  # the 2d and 3d layers refer to the 1d one
                )
            )


def python(code: str) -> Any:
    """Runs code in a fresh interpreter; it prints one line of JSON and nothing else."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_core_needs_torch_alone() -> None:
    """Imported with every warning an error, it adds itself and torch's own modules, no others."""
    added = python(
        "import json, sys, warnings\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "warnings.simplefilter('error')\n"
        "import mamlpp_ext\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert "mamlpp_ext.task_batch.loss" in added
    assert not [name for name in added if name.startswith("mamlpp_ext.integrations")]
    roots = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert roots <= {"mamlpp_ext", "torch"}


def test_missing_extras() -> None:
    """Without higher and torchopt the core runs, and the adapters say what to install."""
    errors = python(
        "import json, sys\n"
        "sys.modules['higher'] = sys.modules['torchopt'] = None\n"
        "import torch, mamlpp_ext as mpp\n"
        "net = mpp.convert_batchnorm(torch.nn.Sequential(\n"
        "    torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), 2)\n"
        "x, y = torch.randn(2, 4, 3), torch.randint(2, (2, 4))\n"
        "loss_fn = torch.nn.functional.cross_entropy\n"
        "lslr = mpp.LSLR(net, 2)\n"
        "mpp.task_batch_loss(net, lslr, (x, y, x, y), loss_fn, num_steps=2).loss.backward()\n"
        "errors = []\n"
        "for name in ('higher', 'torchopt'):\n"
        "    try:\n"
        "        __import__('mamlpp_ext.integrations.' + name)\n"
        "    except ImportError as error:\n"
        "        errors.append(str(error))\n"
        "print(json.dumps(errors))"
    )
    for name, error in zip(("higher", "torchopt"), errors, strict=True):
        assert f"pip install 'mamlpp_ext[{name}]'" in error
        assert f"needs the package {name}, which is not installed" in error


def imported(package: str, versions: list[str]) -> list[tuple[str | None, list[str]]]:
    """Imports what needs ``package`` in each of its versions: the error, and the warnings."""
    module = "mamlpp_ext" if package == "torch" else f"mamlpp_ext.integrations.{package}"
    return python(
        "import json, sys, warnings\n"
        "from importlib import metadata\n"
        "import torch, higher, torchopt\n"
        "find, found = metadata.version, []\n"
        f"for number in {versions}:\n"
        f"    if {package!r} == 'torch':\n"
        "        torch.__version__ = number\n"
        f"    metadata.version = lambda name: number if name == {package!r} else find(name)\n"
        "    error = None\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        try:\n"
        f"            import {module}\n"
        "        except ImportError as refusal:\n"
        "            error = str(refusal)\n"
        "    found.append([error, [str(w.message) for w in caught]])\n"
        "    assert all(w.category is UserWarning for w in caught)\n"
        "    assert all(w.filename == '<string>' for w in caught)\n"  # of who imports
        "    for name in [name for name in sys.modules if name.startswith('mamlpp_ext')]:\n"
        "        del sys.modules[name]\n"
        "print(json.dumps(found))"
    )


def test_an_older_torch_is_refused() -> None:
    """With its number, what is legal and what to do; whatever is built on a tested one passes."""
    old = ["1.13.1", "2.5.1+cu124", "2"]
    for version, (error, warned) in zip(old, imported("torch", old), strict=True):
        assert f"needs torch from 2.6 on, found {version}; pip install 'torch>=2.6'" in str(error)
        assert warned == []
    tested = ["2.6.0", "2.6.0a0+git1234567", "2.10.0a0+git1234567", "2.13.0+cpu", "2.15.99"]
    assert imported("torch", tested) == [[None, []]] * len(tested)


def test_a_newer_torch_warns_once() -> None:
    new = ["2.16.0", "2.16.0a0+git1234567", "3.0.0", "10.1", "unknown"]
    for version, (error, warned) in zip(new, imported("torch", new), strict=True):
        assert error is None
        (text,) = warned
        assert f"mamlpp_ext was tested with torch 2.6 to 2.15, found {version}, which" in text
        assert "pip install 'torch==2.15.*', or look for a newer mamlpp_ext" in text


@pytest.mark.parametrize(("peer", "oldest"), [("higher", "0.2.1"), ("torchopt", "0.7.3")])
def test_another_peer(peer: str, oldest: str) -> None:
    pytest.importorskip(peer)
    versions = ["0.1.9", oldest, f"{oldest}.post1", "0.9.0", "2"]
    older, *tested, newer, newest = imported(peer, versions)
    name = f"mamlpp_ext.integrations.{peer}"
    refusal = f"{name} needs {peer} from {oldest} on, found 0.1.9; pip install '{peer}>={oldest}'"
    assert older == [refusal, []]
    assert tested == [[None, []]] * 2
    for version, (error, warned) in zip(versions[3:], (newer, newest), strict=True):
        assert error is None
        (text,) = warned
        assert f"{name} was tested with {peer} {oldest}, found {version}, which may" in text


def test_a_peer_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.warns(UserWarning, match="found a copy without metadata"):
        checks.check_version("mamlpp_ext.integrations.higher", "higher")


def test_the_stated_versions_agree() -> None:
    """Of Python in the classifiers and for pip, which refuses older ones; of packages here too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    classifiers = setup["metadata"]["classifiers"].splitlines()
    named = [text.rpartition(" :: ")[2] for text in classifiers if "Python :: 3." in text]
    assert named == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    requires = SpecifierSet(setup["options"]["python_requires"])
    tried = ["3.9.18", "3.10.0", "3.11.7", "3.12.1", "3.13.9", "3.14.0", "3.15.2", "4.0.0"]
    assert list(requires.filter(tried)) == tried[1:]
    extras = setup["options.extras_require"]
    stated = [setup["options"]["install_requires"], extras["higher"], extras["torchopt"]]
    lines = {line for text in stated for line in text.splitlines()}
    for package, (oldest, _) in checks.TESTED.items():
        assert f"{package}>={'.'.join(map(str, oldest))}" in lines  # without a cap


def test_types_are_shipped() -> None:
    assert resources.files("mamlpp_ext").joinpath("py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["mamlpp_ext"].split() == ["py.typed"]


def test_version_is_in_the_changelog() -> None:
    assert f"\n## {mpp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
