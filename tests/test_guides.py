"""The guides: before and after run, after has every part at work, and the diff is short."""

from __future__ import annotations

import difflib
import doctest
import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import few_shot
import guide
import guide_diff
import mamlpp_ext as mpp

EXAMPLES = Path(few_shot.__file__).parent
PAGES = EXAMPLES.parent / "guides"
LIMITS = {
    "higher": 12,
    "torchopt": 12,
    "functional": 13,
    "torch_func": 12,
    "handwritten": 20,
    "learn2learn": 20,
    "first_order": 13,
}
SMALL = {"epochs": 2, "iterations": 2, "tests": 2}


class Watched:
    """Stands for ``mamlpp_ext`` in a script and keeps what the script makes with it."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        part = getattr(mpp, name)

        @functools.wraps(part)
        def make(*args: Any, **kwargs: Any) -> Any:
            self.made[name] = made = part(*args, **kwargs)
            return made

        return make


@pytest.fixture(scope="module")
def afters() -> dict[str, SimpleNamespace]:
    """What each ``_after`` made, when it has been trained for a moment, and its accuracy.

    In float64: Adam makes steps of a gradient that is nothing but float32's rounding.
    """
    torch.set_default_dtype(torch.float64)
    try:
        return {name: train(name) for name in LIMITS}
    finally:
        torch.set_default_dtype(torch.float32)


def train(name: str) -> SimpleNamespace:
    script, watched = importlib.import_module(f"maml_{name}_after"), Watched()
    scheduler, schedulers = torch.optim.lr_scheduler.CosineAnnealingLR, []
    counts = {"losses": 0, "order": 0}

    class CountedLoss(mpp.MultiStepLoss):
        def __call__(self, step_losses: Any) -> torch.Tensor:
            counts["losses"] += 1
            return super().__call__(step_losses)

    class CountedOrder(mpp.DerivativeOrderAnnealing):
        @property
        def second_order(self) -> bool:
            counts["order"] += 1
            return super().second_order

    def schedule(*args: Any, **kwargs: Any) -> Any:
        schedulers.append(scheduler(*args, **kwargs))
        return schedulers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "mpp", watched)
        patch.setattr(mpp, "MultiStepLoss", CountedLoss)
        patch.setattr(mpp, "DerivativeOrderAnnealing", CountedOrder)
        patch.setattr(torch.optim.lr_scheduler, "CosineAnnealingLR", schedule)
        accuracy = script.main(**SMALL)
    made = watched.made
    return SimpleNamespace(
        net=made["convert_batchnorm"],
        lslr=made["LSLR"],
        msl=made["MultiStepLoss"],
        da=made["DerivativeOrderAnnealing"],
        annealing=schedulers[0],
        counts=counts,
        accuracy=accuracy,
    )


@pytest.mark.parametrize("name", LIMITS)
def test_few_lines_change(name: str) -> None:
    before, after = (
        (EXAMPLES / f"maml_{name}_{which}.py").read_text().splitlines()
        for which in ("before", "after")
    )
    changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    added, removed = (sum(line.startswith(sign) for line in changes) for sign in "+-")
    assert 0 < added <= LIMITS[name]
    assert 0 < removed <= LIMITS[name]
    assert guide_diff.count(guide_diff.changes(name)) == (added, removed)  # what its page says


def test_every_guide_has_a_page() -> None:
    pages = "".join(page.read_text() for page in PAGES.glob("*.md"))
    for name in LIMITS:
        for shown in (f"{{guide-diff}} {name}\n", f"{{guide-measured}} {name}\n"):
            assert pages.count(shown) == 1
        rows, _, command = guide_diff.measured(name)
        assert [row[0] for row in rows] == ["", "MAML", "MAML++"]
        assert "measure_guides.py --epochs" in command


@pytest.mark.parametrize("name", LIMITS)
def test_before_learns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"maml_{name}_before")
    assert 0.6 < script.main(**SMALL) < 1
    assert "epoch 1: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", LIMITS)
def test_after_has_every_part_on(name: str, afters: dict[str, SimpleNamespace]) -> None:
    after = afters[name]
    after.annealing.T_max = 10  # the page's run, of which the test makes 2 epochs
    findings = mpp.check_setup(
        after.net,
        after.lslr,
        after.annealing.optimizer,
        multi_step_loss=after.msl,
        derivative_order=after.da,
        meta_scheduler=after.annealing,
    )
    assert [finding for finding in findings if not finding.startswith("on:")] == []


@pytest.mark.parametrize("name", LIMITS)
def test_after_trains_every_part(name: str, afters: dict[str, SimpleNamespace]) -> None:
    after = afters[name]
    assert 0.6 < after.accuracy < 1
    assert len(after.lslr.rates[-2].unique()) == guide.STEPS  # the head's
    norm = after.net.norm1
    for table in (norm.weight, norm.bias):
        assert len(table.unique(dim=0)) == guide.STEPS
    training_forwards = SMALL["epochs"] * SMALL["iterations"] * guide.TASKS * 2
    assert norm.num_batches_tracked.tolist() == [training_forwards] * guide.STEPS  # no test forward
    assert after.counts["losses"] >= SMALL["epochs"] * SMALL["iterations"]
    assert after.counts["order"] >= SMALL["epochs"] * SMALL["iterations"]
    assert after.msl.last_epoch == after.da.last_epoch == after.annealing.last_epoch == 2
    assert after.da.second_order
    assert after.annealing.get_last_lr()[0] < 1e-4


def test_every_after_trains_alike(afters: dict[str, SimpleNamespace]) -> None:
    for name, after in afters.items():
        pairs = zip(after.net.named_parameters(), afters["higher"].net.parameters(), strict=True)
        for (key, mine), theirs in pairs:
            if not key.startswith("conv") or key.endswith("weight"):  # their biases have no effect
                message = f"{key} of {name}"
                torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6, msg=message)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testfile(str(page), module_relative=False, optionflags=flags).failed == 0


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_what_a_page_shows_of_a_loop_runs(name: str, net: torch.nn.Module, task: Any) -> None:
    """With the names of higher's and torchopt's own examples, three inner steps instead of five."""
    x_support, y_support, x_target, y_target = task
    lslr = mpp.LSLR(net, 3)
    adapter = importlib.import_module(f"mamlpp_ext.integrations.{name}")
    names = {
        "mpp": mpp,
        "F": torch.nn.functional,
        **vars(adapter),
        "higher": adapter,
        "torchopt": importlib.import_module("torchopt"),
        "net": net,
        "lslr": lslr,
        "msl": mpp.MultiStepLoss(3, anneal_epochs=10),
        "da": mpp.DerivativeOrderAnnealing(1),
        "x_support": x_support,
        "y_support": y_support,
        "x_target": x_target,
        "y_target": y_target,
        "x_spt": [x_support],
        "y_spt": [y_support],
        "x_qry": [x_target],
        "y_qry": [y_target],
        "i": 0,
        "task_num": 1,
        "n_inner_iter": 3,
        "qry_accs": [],
        "qry_losses": [],
    }
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block.replace("inner_steps(net, 5)", "inner_steps(net, 3)"), names)
    assert blocks
    assert lslr.rates.grad.abs().sum() > 0
    assert names["qry_losses"]
