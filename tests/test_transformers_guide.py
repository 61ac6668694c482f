"""The guide of transformers: both scripts run, little changes, and the meta-gradients are right."""

from __future__ import annotations

import copy
import importlib
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import any_model
import guide_diff
import mamlpp_ext as mpp
from any_model import PATHS, assert_same, outcome, written_out

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
sentences = importlib.import_module("sentences")

# transformers 5 has newer names for it; peft 0.21 asks by the older one, and so does everybody.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated:FutureWarning"
)
PAGE = Path(guide_diff.__file__).parent / "guides" / "transformers.md"
MODELS = ("bert", "lora_bert")
BY_VMAP = ("task_batch_loss", "rematerialize")


def loss_of(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels)


def test_few_lines_change() -> None:
    added, removed = guide_diff.count(guide_diff.changes("transformers"))
    assert 0 < added <= 12
    assert 0 < removed <= 14


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("model", MODELS)
def test_both_run(which: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(f"maml_transformers_{which}")
    make = getattr(sentences, model)
    # Of five classes: by chance a fifth; LoRA in a body never trained does little better.
    least = {"bert": 0.3, "lora_bert": 0.2}[model]
    assert least < script.main(epochs=1, iterations=1, tests=10, make=make) < 1
    assert "epoch 0: accuracy" in capsys.readouterr().out


def first_iteration(model: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the after script makes, and what is in it before and after its first backward."""
    script, made = importlib.import_module("maml_transformers_after"), SimpleNamespace()
    run, adam = mpp.task_batch_loss, torch.optim.Adam

    def watched(net: nn.Module, lslr: mpp.LSLR, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(net, lslr, batch, *args, **kwargs)
        if not vars(made):
            made.net, made.lslr, made.batch, made.msl = net, lslr, batch, kwargs["aggregate"]
            made.start, made.rates = copy.deepcopy(net), copy.deepcopy(lslr)
            made.loss = result.loss.detach()
        return result

    class Watched(adam):
        def step(self, closure: Any = None) -> Any:
            made.optimizer = self
            return super().step(closure)

    monkeypatch.setattr(mpp, "task_batch_loss", watched)
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    script.main(epochs=1, iterations=1, tests=1, make=getattr(sentences, model))
    return made


def gradients(net: nn.Module, lslr: mpp.LSLR) -> any_model.Found:
    return {"rates": lslr.rates.grad, **{name: p.grad for name, p in net.named_parameters()}}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("model", MODELS)
def test_what_after_learns_by_is_the_plain_loop(model, second_order, monkeypatch) -> None:
    monkeypatch.setattr(mpp.DerivativeOrderAnnealing, "second_order", second_order)
    monkeypatch.setattr(any_model, "STEPS", sentences.STEPS)
    made = first_iteration(model, monkeypatch)
    # In the first epoch each step's target loss counts the same, as in the loop written out.
    loss = written_out(made.start, made.rates, made.batch, loss_of, second_order)
    loss.backward()
    torch.testing.assert_close(made.loss, loss.detach(), rtol=1e-9, atol=0)
    found = gradients(made.net, made.lslr)
    assert_same(found, gradients(made.start, made.rates))
    rates = dict(zip(made.lslr.names, found["rates"].abs().amax(dim=1), strict=True))
    # A key's bias moves all scores of a query alike, which softmax does not see.
    assert all(rate > 1e-9 for name, rate in rates.items() if not name.endswith("key.bias"))
    tables = {n: grad for n, grad in found.items() if "LayerNorm" in n and grad is not None}
    assert len(tables) == 6  # weights and biases of three
    assert all(len(grad) == sentences.STEPS for grad in tables.values())
    if model == "lora_bert":
        assert all("lora_" in name or "classifier" in name for name in made.lslr.names)


@pytest.mark.parametrize("model", MODELS)
def test_check_setup_finds_no_problem(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = first_iteration(model, monkeypatch)
    found = mpp.check_setup(made.net, made.lslr, made.optimizer, multi_step_loss=made.msl)
    assert any(finding.startswith("on: learned inner rates") for finding in found)
    assert [finding for finding in found if finding.startswith("problem:")] == []


def blocks() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.mark.usefixtures("float64")
def test_what_the_page_shows_of_lora_is_the_plain_loop() -> None:
    torch.manual_seed(0)
    task = any_model.task_of(sentences.tasks(0, 0)[0].sample(), 0)
    x_support, y_support, x_target, y_target = task
    names: dict[str, Any] = {**vars(sentences), "mpp": mpp, "loss_of": loss_of}
    names |= {"x_support": x_support, "y_support": y_support}
    names |= {"x_target": x_target, "y_target": y_target}
    names |= {"da": mpp.DerivativeOrderAnnealing(0), "msl": mpp.MultiStepLoss(sentences.STEPS, 9)}
    made, loop, _ = blocks()
    exec(made, names)
    net, lslr = copy.deepcopy(names["net"]), copy.deepcopy(names["lslr"])
    exec(loop, names)
    assert all("lora_" in name for name in lslr.names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_model, "STEPS", sentences.STEPS)
        batch = any_model.tree_map(lambda t: t[None], task)
        written_out(net, lslr, batch, loss_of, True).backward()
    assert_same(gradients(names["net"], names["lslr"]), gradients(net, lslr))


def decoder(name: str) -> nn.Module:
    """A Llama or GPT-2 of one layer, for the guide's sentences."""
    sizes = {
        "Llama": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1},
        "GPT2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
    }
    heads = {"num_attention_heads": 2} if name == "Llama" else {}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if not heads else {}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.5}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=30, num_labels=5, **sizes[name], **heads, **dropout, **special
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def two_tasks() -> Any:
    return any_model.tree_map(lambda t: t[: any_model.TASKS], sentences.tasks(0, 0)[0].sample())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", ["higher", "torchopt", "task_batch_loss"])
def test_rows_of_a_llama(path: str) -> None:
    torch.manual_seed(0)
    names = {"llama": decoder("Llama"), "mpp": mpp, "STEPS": any_model.STEPS}
    exec(blocks()[2], names)
    net, batch = names["net"], two_tasks()
    found, expected = (
        outcome(way, net, batch, loss_of, second_order=True) for way in (PATHS[path], written_out)
    )
    assert_same(found, expected, tolerance=1e-6)  # its norms compute in float32
    tables = [grad for name, grad in found.items() if name.endswith("norm.weight")]
    assert len(tables) == 3
    assert all(len(grad) == any_model.STEPS and grad.abs().max() > 0 for grad in tables)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", PATHS)
def test_gpt2_without_a_mask(path: str) -> None:
    torch.manual_seed(0)
    net, batch = decoder("GPT2"), two_tasks()
    if path in BY_VMAP:
        with pytest.raises(RuntimeError, match="pass chunk_size=1 to run the tasks one by one"):
            outcome(PATHS[path], net, batch, loss_of, second_order=True)
        return
    expected = outcome(written_out, net, batch, loss_of, second_order=True)
    assert_same(outcome(PATHS[path], net, batch, loss_of, second_order=True), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", PATHS)
def test_gradient_checkpointing(path: str) -> None:
    torch.manual_seed(0)
    net, batch = sentences.bert(width=8), two_tasks()
    expected = outcome(written_out, net, batch, loss_of, second_order=True)
    net.gradient_checkpointing_enable()
    if path == "higher":  # its copies' layers do without
        assert_same(outcome(PATHS[path], net, batch, loss_of, second_order=True), expected)
        return
    with pytest.raises(RuntimeError, match=r"gradient_checkpointing_disable\(\)"):
        outcome(PATHS[path], net, batch, loss_of, second_order=True)
