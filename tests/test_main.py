"""``python -m mamlpp_ext check``: what it says of a user's model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mamlpp_ext.__main__ import main, script

ROOT = Path(__file__).parents[1]
MODELS = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)

class Pair(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return super().forward(x), x

class Sized(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 2)

class TwoNames(nn.Module):
    # As learn2learn's OmniglotCNN: a module under two names.

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.features = nn.Sequential(nn.Identity(), self.base)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.features(x))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.spare = nn.EmbeddingBag(7, 4), nn.Linear(2, 2)
        self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        output = self.head((self.inner(ids) * mask[..., None]).mean(1))
        return {"logits": output, "squared": self.spare(output[:, :2])}

class Summed(Tokens):
    def forward(self, ids, mask):
        return self.head(self.inner(ids).mean(1) + self.words(ids))

def batch():
    x = {"ids": torch.randint(7, (2, 3, 5)), "mask": torch.ones(2, 3, 5)}
    labels = torch.arange(3).expand(2, 3)
    return x, labels, x, labels

def all_of_it(output, labels):
    return sum(t.square().mean() for t in output.values())

hard = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 2))
ready = nn.Linear(3, 2)
frozen = nn.Linear(3, 2).requires_grad_(False)
number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)


@pytest.mark.usefixtures("models")
def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my_models:make_model", "--steps=3", "--shape=1,8,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "per-step: '1', 4 features, 3 rows" in lines
    assert "adapted: '0.weight', (4, 1, 3, 3)" in lines
    assert "outer loop alone: '1.weight', (3, 4)" in lines
    assert "rates: 12, 4 tensors times 3 steps" in lines
    assert sum(line.startswith("on: ") for line in lines) == 3  # BNRS, BNWB, LSLR
    assert not any(line.startswith(("off: ", "problem: ")) for line in lines)


@pytest.mark.usefixtures("models")
def test_patterns_and_a_model_without_norm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my_models:ready", "--adapt", "bias"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "outer loop alone: 'weight', (2, 3)" in lines
    assert "rates: 5, 1 tensors times 5 steps" in lines
    assert any(line.startswith("off: per-step batch-norm statistics") for line in lines)


@pytest.mark.usefixtures("models")
def test_a_parameter_that_no_gradient_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my_models:Unused", "--shape=3"]) == 1
    assert "problem: no gradient reaches 'spare.weight', 'spare.bias'" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
def test_a_batch_and_a_loss_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """By default the loss is of the logits, which nothing of what is spare takes part in."""
    words = ["check", "my_models:Tokens", "--batch=my_models:batch"]
    assert main(words) == 1
    unreached = "problem: no gradient reaches 'words.weight', 'spare.weight', 'spare.bias'"
    assert unreached in capsys.readouterr().out
    assert main([*words, "--loss=my_models:all_of_it"]) == 1
    assert "problem: no gradient reaches 'words.weight';" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my_models:hard", "--shape=3"], "use F.relu6(x + 3) / 6 in its place"),
        (["my_models:Summed", "--batch=my_models:batch"], "use F.embedding(...).mean(1) in its"),
    ],
)
def test_what_has_no_second_derivative_is_a_problem(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in first order it is seen that gradients reach all that they should."""
    assert main(["check", *arguments]) == 1
    (problem, *others) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("problem:")
    ]
    assert problem.startswith("problem: an inner loop runs in first order alone: torch has no")
    assert said in problem
    assert not any("words" in other or "Linear" in other for other in others)


@pytest.mark.usefixtures("models")
def test_a_module_under_two_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my_models:TwoNames", "--shape=3"]) == 0
    assert "problem:" not in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my_models"], "'my_models' is not of the form package.module:name"),
        (["my_modelz:ready"], "No module named 'my_modelz'"),
        (["my_models:redy"], "module my_models has no 'redy'; it defines torch, nn, make_model"),
        (["my_models:number"], "gave a int; name a torch.nn.Module"),
        (
            ["my_models:Sized"],
            "my_models:Sized takes arguments (missing a required argument: 'width'); name a "
            "function without arguments that returns the model, such as 'def make_model(): "
            "return Sized(...)', as my_models:make_model",
        ),
        (["my_models:frozen"], "nothing is left to adapt in Linear"),
        (["my_models:ready", "--steps=0"], "num_steps must be at least 1, got 0"),
        (["my_models:ready", "--adapt", "hed.*"], "adapt pattern 'hed.*' matches no parameter"),
        (["my_models:ready", "--shape=3x4"], "at least 1 with commas between, got '3x4'"),
        (["my_models:ready", "--shape=0"], "at least 1 with commas between, got '0'"),
        (["my_models:Pair", "--shape=3"], "the model returned a tuple, --shape needs one"),
        (["my_models:ready", "--shape=4"], "shapes cannot be multiplied"),
        (["my_models:Tokens", "--shape=5"], "the model does not take noise [8, 5], as --shape has"),
        (["my_models:Tokens", "--batch=my_models:bath"], "module my_models has no 'bath'"),
        (["my_models:ready", "--batch=my_models:batch"], "does not take the x_support of --batch"),
        (["my_models:ready", "--loss=my_models:batch"], "needs labels, which only --batch has"),
    ],
)
def test_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", *arguments])
    assert message in capsys.readouterr().err


def test_help_names_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: mamlpp-ext" in said
    for words in ("check", "benchmark", "Exit codes: 0; 1 if check finds a problem; 2 for wrong"):
        assert words in said


@pytest.mark.parametrize("arguments", [[], ["measure"]])
def test_another_command_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_the_benchmark_gets_its_own_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["benchmark", "--help"])
    assert "--repeats" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "my_models", "--shape=3"])
    assert "'my_models' is not of the form" in capsys.readouterr().err


def test_the_script_finds_what_is_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["mamlpp-ext", "check", "my_own_models:Unused", "--shape=3"])
    assert script() == 1
    assert "problem: no gradient reaches" in capsys.readouterr().out
    assert sys.path[0] == str(tmp_path)
    del sys.modules["my_own_models"]


@pytest.mark.usefixtures("models")
def test_as_a_module() -> None:
    # As python -m does it, the folder it is run in comes first in the path.
    # torch 2.6 leaves a temporary folder to the end of the process, with a ResourceWarning.
    warnings = ["-W", "error", "-W", "ignore::ResourceWarning"]
    command = [sys.executable, *warnings, "-m", "mamlpp_ext", "check", "my_models:make_model"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert "rates: 20, 4 tensors times 5 steps" in found.stdout
    assert found.stderr == ""
