"""The documentation builds without a warning, and has every public name and every message."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from docutils import nodes
from torch import nn

import error_messages
import mamlpp_ext as mpp
from error_tables import every_table
from mamlpp_ext.check_setup.model import describe, noise_of
from mamlpp_ext.integrations import higher, torchopt
from test_main import MODELS

ROOT = Path(__file__).parents[1]
MODULES = (mpp, higher, torchopt)
SECTIONS = re.compile(r"^ *(Args|Attributes|Shape|Returns|Yields|Raises|Example|Source):$", re.M)
# What the docstring of each name has, beside Example and Source. A name without Raises refuses
# nothing of its own.
DOCUMENTED: dict[str, str] = {
    "mamlpp_ext.DerivativeOrderAnnealing": "Args Attributes Raises",
    "mamlpp_ext.FinalStepLoss": "Args Attributes Raises",
    "mamlpp_ext.FusedSequential": "Shape",
    "mamlpp_ext.LSLR": "Args Attributes Raises",
    "mamlpp_ext.MultiStepLoss": "Args Attributes Raises",
    "mamlpp_ext.PerStepBatchNorm1d": "Args Shape Raises",
    "mamlpp_ext.PerStepBatchNorm2d": "Shape",
    "mamlpp_ext.PerStepBatchNorm3d": "Shape",
    "mamlpp_ext.TaskBatchLoss": "Args Raises",
    "mamlpp_ext.at_step": "Args Raises",
    "mamlpp_ext.check_setup": "Args Returns Raises",
    "mamlpp_ext.convert_batchnorm": "Args Returns Raises",
    "mamlpp_ext.convert_norm": "Args Returns Raises",
    "mamlpp_ext.frozen_statistics": "Args Raises",
    "mamlpp_ext.functional_call": "Args Returns Raises",
    "mamlpp_ext.inner_steps": "Args Returns Raises",
    "mamlpp_ext.multi_step_loss_weights": "Args Returns Raises",
    "mamlpp_ext.per_step_parameters": "Args Returns Raises",
    "mamlpp_ext.task_batch_loss": "Args Returns Raises",
    "mamlpp_ext.twice_differentiable": "Args Raises",
    "mamlpp_ext.integrations.higher.DifferentiableLSLR": "Args Raises",
    "mamlpp_ext.integrations.higher.LSLROptimizer": "Args Raises",
    "mamlpp_ext.integrations.higher.innerloop_ctx": "Args Yields Raises",
    "mamlpp_ext.integrations.torchopt.MetaLSLR": "Args Attributes Raises",
    "mamlpp_ext.integrations.torchopt.innerloop_ctx": "Args Yields Raises",
    "mamlpp_ext.integrations.torchopt.lslr_transform": "Args Returns Raises",
}
RETURNED = {  # never made by a user: attributes say everything
    "mamlpp_ext.TaskBatchResult",
    "mamlpp_ext.integrations.torchopt.LSLRState",
}
NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
}
MESSAGES = [
    message
    for module, tree in error_messages.modules().items()
    for message in error_messages.messages(module, tree)
]


class Text(HTMLParser):
    """The words of a page, and where one can link to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words, self.ids = "", set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids |= {str(value) for name, value in attrs if name == "id"}

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages. The scripts of the gallery run, unless they did so in an earlier build."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    result = subprocess.run(
        [*command, ROOT / "docs", folder], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_reference_has_every_public_name(built: Path) -> None:
    assert Text(built / "reference.html").ids >= set(NAMES)


def test_guides_have_their_diffs(built: Path) -> None:
    for guide in ("higher", "torchopt"):
        page = Text(built / "guides" / f"{guide}.html").words
        assert "mpp.inner_steps" in page
        assert "--- " in page


@pytest.mark.parametrize("project", ["python", "torch", "higher", "torchopt"])
def test_inventories_name_what_there_is(project: str) -> None:
    lines = (ROOT / "docs" / "inventories" / f"{project}.inv").read_text().splitlines()[3:]
    names = [line.split()[0] for line in lines if not line.startswith("nn.")]
    assert len(names) > 1
    assert not [name for name in names if pydoc.locate(name) is None]


def test_gallery_has_a_picture_of_every_script(built: Path) -> None:
    scripts = sorted((ROOT / "docs" / "gallery").glob("plot_*.py"))
    assert len(scripts) >= 4
    for script in scripts:
        page = (built / "auto_gallery" / f"{script.stem}.html").read_text(encoding="utf-8")
        assert f"sphx_glr_{script.stem}_001.png" in page
        picture = built / "_images" / f"sphx_glr_{script.stem}_001.png"
        assert picture.stat().st_size > 10_000


def test_troubleshooting_has_every_message(built: Path) -> None:
    page = Text(built / "troubleshooting.html")
    for message in MESSAGES:
        assert message.text in page.words
        assert nodes.make_id(message.place) in page.ids


def test_messages_are_those_of_every_raise() -> None:
    """The collector knows every form in which the package raises something."""
    raised = [m for m in MESSAGES if m.kind not in ("finding", "RuntimeError of load_state_dict")]
    places = {message.place for message in raised}
    collected = 0
    for tree in error_messages.modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc and "SystemExit" not in ast.unparse(node):
                assert isinstance(node.exc, ast.Call)
                called = ast.unparse(node.exc.func)  # an exception, or a function that makes one
                assert "Error" in called or any(p.endswith(f".{called}") for p in places)
            collected += isinstance(node, ast.Call) and "Error" in ast.unparse(node.func)
    assert len(raised) == collected
    for message in MESSAGES:  # enough is known of each to find it by
        assert len(re.sub(r"\{.*?\}", "", message.text)) > 20


def said_by(act: Callable[[Any], Any], model: nn.Module) -> list[str]:
    """The lines of the exception: load_state_dict puts a line before the package's message."""
    try:
        act(model)
    except Exception as error:
        said = str(error.args[0])
        return [said, *(line.strip() for line in said.splitlines())]
    raise AssertionError


def findings() -> list[str]:
    """What is said of setups in which everything is wrong."""
    norms = nn.BatchNorm1d(4), mpp.PerStepBatchNorm1d(4, 2)
    net = nn.Sequential(nn.Linear(2, 4), *norms)
    net[0].weight.grad = torch.zeros(4, 2)
    net[2](torch.randn(3, 4))
    optimizer = torch.optim.Adam([net[0].weight], lr=1e-3)
    lslr = mpp.LSLR(net, 3)
    constant = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-3)
    msl, da = mpp.MultiStepLoss(2, 10), mpp.DerivativeOrderAnnealing(10)
    return [
        *mpp.check_setup(
            net,
            lslr,
            optimizer,
            multi_step_loss=msl,
            derivative_order=da,
            meta_scheduler=constant,
            run_epochs=5,
        ),
        *unsound(),
        *describe(nn.Sequential(nn.Linear(3, 2), nn.Hardsigmoid()), 2, None, noise_of((3,))),
        *mpp.check_setup(nn.Identity(), lslr, multi_step_loss=mpp.MultiStepLoss(3, 0)),
    ]


def unsound() -> list[str]:
    """What is said of trainings that go wrong."""
    net = nn.Sequential(mpp.PerStepBatchNorm1d(4, 2), nn.Linear(4, 2))
    lslr = mpp.LSLR(net, 2, adapt="*")
    lslr.rates.data[:, 1] = torch.tensor([-1.0, 5.0, 5.0, 5.0])
    lslr.rates.grad = torch.zeros_like(lslr.rates)
    net[1].weight.grad = torch.full((2, 4), 1e6)
    net[1].bias.grad = torch.full((2,), torch.nan)
    msl = mpp.MultiStepLoss(2, 10)
    msl([torch.tensor(1.0), torch.tensor(2.0)])
    found = mpp.check_setup(net, lslr, multi_step_loss=msl)
    net[1].bias.grad.zero_()
    found += mpp.check_setup(net.eval(), lslr)
    refused, wrapper = nn.Sequential(nn.SyncBatchNorm(4)), nn.Sequential(net[1])
    return [*found, *mpp.check_setup(refused, None), *mpp.check_setup(wrapper, mpp.LSLR(net[1], 2))]


@pytest.mark.usefixtures("float64")
def test_every_message_is_raised_somewhere() -> None:
    """What the rows of every test_errors.py raise is on the page, and what is there is raised."""
    silent = {message for message in MESSAGES if message.kind != "finding"}
    for name, (build, act, *_) in every_table().items():
        lines = said_by(act, build())
        found = {m for m in MESSAGES if any(m.matches(line) for line in lines)}
        assert found, (name, lines)
        silent -= found
    assert not silent
    known = {message for message in MESSAGES if message.kind == "finding"}
    unsaid = set(known)
    problems = [found for found in findings() if found.startswith(error_messages.FINDING)]
    for problem in problems:
        found = {message for message in known if message.matches(problem)}
        assert found, problem
        unsaid -= found
    assert not unsaid


def test_table_has_every_public_name() -> None:
    assert DOCUMENTED.keys() | RETURNED == NAMES.keys() - {"mamlpp_ext.__version__"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_has_its_sections(name: str) -> None:
    found = SECTIONS.findall(NAMES[name].__doc__)
    assert sorted(found) == sorted([*DOCUMENTED[name].split(), "Example", "Source"])


@pytest.mark.parametrize("name", sorted(RETURNED))
def test_what_is_returned_has_attributes(name: str) -> None:
    assert SECTIONS.findall(NAMES[name].__doc__) == ["Attributes"]


def methods() -> dict[str, Any]:
    """The methods that the reference lists."""
    listed = re.findall(
        r"(?:currentmodule:: (\S+)|autoclass:: (\S+)|:members: (.+))",
        (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"),
    )
    found, module, owner = {}, "", ""
    for new_module, new_owner, members in listed:
        module, owner = new_module or module, new_owner or owner
        for member in filter(None, members.split(", ")):
            found[f"{module}.{owner}.{member}"] = getattr(NAMES[f"{module}.{owner}"], member)
    return found


@pytest.mark.parametrize("name", methods())
def test_methods_say_what_they_take_and_return(name: str) -> None:
    method = methods()[name]
    text = (method.fget if isinstance(method, property) else method).__doc__
    assert text
    assert text.strip()[0].isupper()
    if not isinstance(method, property):
        for parameter in list(inspect.signature(method).parameters)[1:]:
            assert re.search(rf"\b{parameter}\b", text), parameter
        returns = inspect.signature(method).return_annotation
        assert returns in ("None", None) or re.search(r"\bReturns\b", text)


def test_command_prints_what_the_reference_shows(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ python (.+?)\n(.+?)```", page, re.DOTALL)
    assert block is not None
    (tmp_path / "my_models.py").write_text(MODELS)
    printed = subprocess.run(
        [sys.executable, *block[1].split()],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert printed.stdout == block[2]
