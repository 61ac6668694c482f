"""How a module may be dressed: in every path right, or refused with the name of one that is.

``docs/dressings.md`` has the table; ``python tests/test_dressing.py`` writes it.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from any_model import Found, assert_same
from dressings import DRESSES, PATHS, Dress
from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

pytestmark = pytest.mark.usefixtures("float64")

STEPS, TASKS = 2, 2
PAGE = Path(__file__).parents[1] / "docs" / "dressings.md"
BEGIN = "<!-- written by tests/test_dressing.py -->\n\n"
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def by_higher(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> Tensor:
    with mpp_higher.innerloop_ctx(net, lslr, second_order=order) as (fnet, diffopt):
        return losses(fnet, diffopt.step, task)


def by_torchopt(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> Tensor:
    with mpp_torchopt.innerloop_ctx(net, lslr, second_order=order) as inner_opt:
        return losses(net, inner_opt.step, task)


def losses(net: nn.Module, adapt: Callable[[Tensor], Any], task: Task) -> Tensor:
    found = []
    for _ in mpp.inner_steps(net, STEPS):
        adapt(F.cross_entropy(net(task[0]), task[1]))
        found.append(F.cross_entropy(net(task[2]), task[3]))
    return torch.stack(found).mean()


def by_update(net: nn.Module, lslr: mpp.LSLR, task: Task, order: bool) -> Tensor:
    params, found = dict(net.named_parameters()), []
    with mpp.twice_differentiable(net, second_order=order):
        for step in mpp.inner_steps(net, STEPS):
            loss = F.cross_entropy(mpp.functional_call(net, params, task[0]), task[1])
            wanted = [params[name] for name in lslr.names]
            grads = torch.autograd.grad(loss, wanted, create_graph=order, allow_unused=True)
            params = lslr.update(params, dict(zip(lslr.names, grads, strict=True)), step)
            found.append(F.cross_entropy(mpp.functional_call(net, params, task[2]), task[3]))
    return torch.stack(found).mean()


def in_turn(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(net: nn.Module, lslr: mpp.LSLR, tasks: Task, order: bool) -> Tensor:
        each = [loop(net, lslr, task, order) for task in zip(*tasks, strict=True)]
        return torch.stack(each).mean()

    return run


def at_once(**how: Any) -> Callable[..., Tensor]:
    def run(net: nn.Module, lslr: mpp.LSLR, tasks: Task, order: bool) -> Tensor:
        settings = {"num_steps": STEPS, "aggregate": mean, "second_order": order, **how}
        return mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, **settings).loss

    return run


def mean(step_losses: Tensor) -> Tensor:
    return step_losses.mean(-1)


RUNS = {
    "higher": in_turn(by_higher),
    "torchopt": in_turn(by_torchopt),
    "plain loop": in_turn(by_update),
    "task_batch_loss": at_once(),
    "chunk_size=1": at_once(chunk_size=1),
    "rematerialize": at_once(rematerialize=True, chunk_size=1),
}


def tasks() -> Task:
    drawn = torch.Generator().manual_seed(1)
    shapes = (TASKS, 4), (TASKS, 5)
    parts = [
        part
        for shape in shapes
        for part in (
            torch.randn(*shape, 3, generator=drawn),
            torch.randint(2, shape, generator=drawn),
        )
    ]
    return tuple(parts)


def dressed(dress: Dress) -> tuple[nn.Module, mpp.LSLR]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = dress.make()
    lslr = mpp.LSLR(net, STEPS)
    with torch.no_grad():
        lslr.rates.uniform_(0.2, 1.0)
    return net, lslr


def by_hand(dress: Dress, order: bool) -> Found:
    """The loop over tasks and steps, with the forward that is written out."""
    net, lslr = dressed(dress)
    weights = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    rates = lslr.rates.detach().clone().requires_grad_()
    kept = {n: b.clone() for n, b in net.named_buffers()}
    found = []
    for x, y, x_target, y_target in zip(*tasks(), strict=True):
        w = dict(weights)
        for step in range(STEPS):
            loss = F.cross_entropy(dress.forward(w, x, kept), y)
            grads = torch.autograd.grad(loss, [w[n] for n in lslr.names], create_graph=order)
            for i, (name, g) in enumerate(zip(lslr.names, grads, strict=True)):
                w[name] = w[name] - rates[i, step] * g
            found.append(F.cross_entropy(dress.forward(w, x_target, kept), y_target))
    loss = torch.stack(found).mean()
    slopes = torch.autograd.grad(loss, [*weights.values(), rates])
    kept = {name: b for name, b in kept.items() if not name.startswith(".")}
    return {"loss": loss.detach(), **dict(zip([*weights, "rates"], slopes, strict=True)), **kept}


def by_path(dress: Dress, path: str, order: bool) -> Found:
    net, lslr = dressed(dress)
    loss = RUNS[path](net, lslr, tasks(), order)
    loss.backward()
    slopes = {n: p.grad for n, p in net.named_parameters()}
    return {"loss": loss.detach(), **slopes, "rates": lslr.rates.grad, **dict(net.named_buffers())}


@cache
def refusal(name: str, path: str, order: bool) -> str:
    """Returns nothing if a path computes what is written out, else how it refuses."""
    dress = DRESSES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about dresses it has better ones for
        try:
            found = by_path(dress, path, order)
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error)
        assert_same(found, by_hand(dress, order))
    return ""


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A group of this process alone, which DistributedDataParallel asks for."""
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.mark.parametrize("order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DRESSES)
def test_a_dress_is_right_or_refused(name: str, path: str, order: bool) -> None:
    words = dict(DRESSES[name].refused).get(path)
    said = refusal(name, path, order)
    assert (words in said) if words else not said, said


@pytest.mark.parametrize("name", [name for name, dress in DRESSES.items() if dress.refused])
def test_a_refusal_leaves_the_model_as_it_was(name: str, unchanged: Any) -> None:
    for path, _ in DRESSES[name].refused:
        torch.manual_seed(0)
        net = DRESSES[name].make()
        with unchanged(net), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                RUNS[path](net, mpp.LSLR(net, STEPS), tasks(), True)


# What each refusal says, in the table.
INSTEAD = {
    "higher cannot patch this": "refused",
    "are for mamlpp_ext.integrations.torchopt": "refused at the first step",
    "pass chunk_size=1": "`chunk_size=1`",
    "adapt the model that it was made of": "adapt what was scripted",
    "use task_batch_loss, or the layer": "`task_batch_loss`",
    "pass the model in it": "pass its `.module`",
    "run one batch": "run a batch first",
}


def table() -> str:
    lines = ["| dress | " + " | ".join(PATHS) + " |", "|---" * (len(PATHS) + 1) + "|"]
    for name in DRESSES:
        lines.append(f"| {name} | " + " | ".join(cell(name, path) for path in PATHS) + " |")
    return "\n".join([*lines, ""])


def cell(name: str, path: str) -> str:
    second, first = (
        next((words for part, words in INSTEAD.items() if part in said), said) or "yes"
        for said in (refusal(name, path, order) for order in (True, False))
    )
    return second if second == first else f"{second}; first order: {first}"


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the page is of the newest torch")
def test_the_page_is_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2] == table()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    before = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    with tempfile.TemporaryDirectory() as folder, one_process(Path(folder)):
        sys.stdout.write(table())
        PAGE.write_text(before + BEGIN + table(), encoding="utf-8")
