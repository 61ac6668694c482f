"""The table of rates: what it adapts, its pure update, its gradients and its checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

EVERY = ("body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")
DEFAULT = ("body.weight", "body.bias", "head.weight", "head.bias")


@pytest.mark.parametrize(
    ("adapt", "names"),
    [
        (None, DEFAULT),
        ("*", EVERY),
        ("head.*", ("head.weight", "head.bias")),
        (["head.*", "*.bias"], ("body.bias", "norm.bias", "head.weight", "head.bias")),
        ((pattern for pattern in ("body.weight",)), ("body.weight",)),
        ({"*.[bw]*"}, EVERY),
        (lambda name: "norm" in name, ("norm.weight", "norm.bias")),
    ],
    ids=["default", "str", "pattern", "patterns", "generator", "set", "callable"],
)
def test_what_is_adapted(net: nn.Module, adapt: Any, names: tuple[str, ...]) -> None:
    lslr = mpp.LSLR(net, 3, adapt=adapt)
    assert lslr.names == names  # in the order of named_parameters()
    assert lslr.rates.shape == (len(names), 3)


@pytest.mark.parametrize("adapt", [None, "*", lambda name: True], ids=["default", "*", "callable"])
def test_frozen_parameters_are_not_adapted(net: nn.Module, adapt: Any) -> None:
    net.body.weight.requires_grad_(False)
    assert "body.weight" not in mpp.LSLR(net, 3, adapt=adapt).names


def test_shared_parameters_have_one_rate() -> None:
    layer = nn.Linear(3, 3)
    assert mpp.LSLR(nn.Sequential(layer, layer), 2).names == ("0.weight", "0.bias")


def test_plain_batchnorm_is_adapted() -> None:
    # As in plain MAML: the outer loop alone learns the rows of per-step layers, not other norms.
    assert mpp.LSLR(nn.BatchNorm1d(3), 2).names == ("weight", "bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_initial_rates(dtype: torch.dtype) -> None:
    rates = mpp.LSLR(nn.Linear(3, 2).to(dtype), 5, lr=0.3).rates
    torch.testing.assert_close(rates, torch.full((2, 5), 0.3).to(rates))
    # A rate changes by less than bfloat16 resolves, so the table is at least float32.
    assert rates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert isinstance(rates, nn.Parameter)
    assert rates.requires_grad


def test_device_follows_the_model() -> None:
    assert mpp.LSLR(nn.Linear(3, 2, device="meta"), 5).rates.device.type == "meta"


def test_fixed_rates_are_sgd(net: nn.Module, task: tuple[Tensor, ...]) -> None:
    lslr = mpp.LSLR(net, 3, lr=0.2, adapt="*", learnable=False)
    assert not lslr.rates.requires_grad
    loss = nn.functional.cross_entropy(net(task[0]), task[1])
    params = dict(net.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True))
    updated = lslr.update(params, grads, 1)
    for name, p in params.items():
        p.grad = grads[name]
    torch.optim.SGD(params.values(), lr=0.2).step()
    torch.testing.assert_close(updated, params)


def random_grads(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    params = dict(net.named_parameters())
    return params, {name: torch.randn_like(p) for name, p in params.items()}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_update_is_the_equation(net: nn.Module, lslr: mpp.LSLR, step: int) -> None:
    params, grads = random_grads(net)
    updated = lslr.update(params, grads, step)
    assert list(updated) == list(params)
    for name, p in params.items():
        rate = lslr.rates[lslr.names.index(name), step] if name in lslr.names else 0.0
        torch.testing.assert_close(updated[name], p - rate * grads[name])
    assert updated["norm.weight"] is params["norm.weight"]


def test_update_is_pure(net: nn.Module, lslr: mpp.LSLR, unchanged: Any) -> None:
    params, grads = random_grads(net)
    before = copy.deepcopy((params, grads))
    keys = list(params), list(grads)
    with unchanged(net), unchanged(lslr):
        updated = lslr.update(params, grads, 0)
        for tensor in updated.values():
            tensor.detach().add_(0.0)
    torch.testing.assert_close((params, grads), before)
    assert (list(params), list(grads)) == keys
    assert updated is not params


def test_no_gradient_no_update(net: nn.Module, lslr: mpp.LSLR) -> None:
    params, grads = random_grads(net)
    grads["body.bias"] = None
    del grads["norm.weight"], params["norm.bias"]  # what is not adapted need not be there
    updated = lslr.update(params, grads, 0)
    assert updated["body.bias"] is params["body.bias"]
    assert updated["body.weight"] is not params["body.weight"]


def test_rates_at_a_step(lslr: mpp.LSLR) -> None:
    rates = lslr.rates_at(2)
    assert tuple(rates) == lslr.names
    torch.testing.assert_close(torch.stack(list(rates.values())), lslr.rates[:, 2])


def test_steps_beyond_the_last_reuse_its_column(net: nn.Module) -> None:
    lslr = mpp.LSLR(net, 3, extra_steps="last")
    lslr.rates.data.normal_()
    columns = [[rate.item() for rate in lslr.rates_at(step).values()] for step in (1, 2, 7)]
    assert columns[1] == columns[2] != columns[0]


def test_gradient_to_a_rate(net: nn.Module, lslr: mpp.LSLR) -> None:
    params, grads = random_grads(net)
    adapted = {name: p.detach().requires_grad_() for name, p in params.items()}
    for step in range(3):
        adapted = lslr.update(adapted, grads, step)
    loss = sum(p.pow(3).sum() for p in adapted.values())
    slopes = torch.autograd.grad(loss, list(adapted.values()), retain_graph=True)
    slopes = dict(zip(adapted, slopes, strict=True))
    loss.backward()
    for j, name in enumerate(lslr.names):  # the loss of constant gradients: the same at each step
        expected = -(slopes[name] * grads[name]).sum()
        torch.testing.assert_close(lslr.rates.grad[j], expected.expand(3))


def test_sign_of_a_rate_is_free(net: nn.Module, lslr: mpp.LSLR) -> None:
    params, grads = random_grads(net)
    forth = lslr.update(params, grads, 0)
    lslr.rates.data.neg_()
    torch.testing.assert_close(lslr.update(forth, grads, 0), params)


def saved_and_loaded(lslr: mpp.LSLR, twin: mpp.LSLR) -> mpp.LSLR:
    file = io.BytesIO()
    torch.save(lslr.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize(
    "again",
    [
        saved_and_loaded,
        lambda lslr, twin: copy.deepcopy(lslr),
        lambda lslr, twin: pickle.loads(pickle.dumps(lslr)),
    ],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_round_trips(net: nn.Module, lslr: mpp.LSLR, again: Callable[..., mpp.LSLR]) -> None:
    twin = again(lslr, mpp.LSLR(net, 3))
    assert twin.names == lslr.names
    torch.testing.assert_close(twin.rates, lslr.rates)
    twin.rates.data.zero_()
    assert lslr.rates.count_nonzero() == lslr.rates.numel()


def test_travels_in_a_checkpoint_with_the_model(net: nn.Module, lslr: mpp.LSLR) -> None:
    learner = nn.ModuleDict({"net": net, "lslr": lslr})
    other = nn.ModuleDict({"net": copy.deepcopy(net), "lslr": mpp.LSLR(net, 3)})
    other.load_state_dict(learner.state_dict())
    torch.testing.assert_close(other["lslr"].rates, lslr.rates)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("first", ["body", "head"])  # whichever sorts first
def test_a_table_of_other_names_is_refused(
    net: nn.Module, strict: bool, first: str, unchanged: Any
) -> None:
    # As many names in each, so that the rates would fit.
    adapts = {"body": ["body.*"], "head": ["body.bias", "head.weight"]}
    lslr = mpp.LSLR(net, 3, adapt=adapts.pop(first))
    other = mpp.LSLR(net, 3, lr=0.7, adapt=adapts.popitem()[1])
    gone, new = (set(a.names) - set(b.names) for a, b in ((other, lslr), (lslr, other)))
    with unchanged(lslr), pytest.raises(RuntimeError) as error:
        lslr.load_state_dict(other.state_dict(), strict=strict)
    for words in (
        f"only there '{gone.pop()}'",
        f"only in this LSLR '{new.pop()}'",
        "nothing was loaded",
        "Build the LSLR from the model and with the adapt",
    ):
        assert words in str(error.value)
    assert "order" not in str(error.value)


def test_a_table_of_more_names_is_refused(net: nn.Module, lslr: mpp.LSLR, unchanged: Any) -> None:
    fewer = mpp.LSLR(net, 3, adapt="head.*")
    for one, two in ((lslr, fewer), (fewer, lslr)):
        with (
            unchanged(one),
            pytest.raises(RuntimeError, match=r"'body.weight', 'body.bias'") as error,
        ):
            one.load_state_dict(two.state_dict())
        assert "order" not in str(error.value)


def test_rates_of_another_shape_are_refused(lslr: mpp.LSLR, unchanged: Any) -> None:
    for rates in (torch.ones(()), torch.ones(3), torch.ones(4, 5, 2)):
        state = {**lslr.state_dict(), "rates": rates}
        with unchanged(lslr), pytest.raises(RuntimeError, match="size mismatch for rates"):
            lslr.load_state_dict(state)


def test_the_dtype_of_the_first_adapted_parameter_decides() -> None:
    net = nn.Sequential(nn.Linear(2, 2).float(), nn.Linear(2, 2).double())
    assert mpp.LSLR(net, 2).rates.dtype == torch.float32
    assert mpp.LSLR(net, 2, adapt="1.*").rates.dtype == torch.float64


@pytest.mark.parametrize("lr", [float("inf"), -torch.inf, torch.nan, -1e-9])
def test_a_rate_that_is_not_finite_or_negative_is_refused(net: nn.Module, lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0"):
        mpp.LSLR(net, 3, lr=lr)


def test_a_gradient_of_another_shape_is_refused(net: nn.Module, lslr: mpp.LSLR) -> None:
    params, grads = random_grads(net)
    for shape in ((), (1,), (3, 4), (1, 4, 3)):  # some would broadcast, some make it larger
        with pytest.raises(ValueError, match=r"the gradient of 'body.weight' has shape"):
            lslr.update(params, {**grads, "body.weight": torch.ones(shape)}, 0)


def test_the_rate_of_the_paper_is_the_default(net: nn.Module) -> None:
    assert mpp.LSLR(net, 2).rates.unique().tolist() == [0.1]


def test_tensors_are_known_by_identity(net: nn.Module, lslr: mpp.LSLR) -> None:
    assert [lslr.name_of(p) for p in net.parameters() if lslr.name_of(p)] == list(lslr.names)
    assert lslr.name_of(net.norm.weight) is None
    assert lslr.name_of(net.head.weight.detach().clone()) is None


def test_a_table_in_another_order_is_refused(unchanged: Any) -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    del two.bias, two.weight
    two.bias, two.weight = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 3))
    lslr = mpp.LSLR(one, 3)
    with unchanged(lslr), pytest.raises(RuntimeError, match="the order differs"):
        lslr.load_state_dict(mpp.LSLR(two, 3, lr=0.7).state_dict())


def test_a_table_of_other_steps_is_refused(net: nn.Module, lslr: mpp.LSLR, unchanged: Any) -> None:
    for steps in (2, 5):
        with unchanged(lslr), pytest.raises(RuntimeError, match=f"num_steps={steps}, this LSLR"):
            lslr.load_state_dict(mpp.LSLR(net, steps).state_dict())


def test_a_table_of_many_steps_is_loaded(net: nn.Module) -> None:
    one, two = mpp.LSLR(net, 1000, lr=0.7), mpp.LSLR(net, 1000)
    torch.testing.assert_close(saved_and_loaded(one, two).rates, one.rates)


def test_rates_are_the_only_parameters(net: nn.Module, lslr: mpp.LSLR) -> None:
    # The model's own parameters, which it remembers, must not reach the meta-optimizer twice.
    assert [name for name, _ in lslr.named_parameters()] == ["rates"]
    assert [*lslr.parameters()] == [lslr.rates]


def test_what_comes_after_a_missing_gradient_is_updated(net: nn.Module, lslr: mpp.LSLR) -> None:
    params = {name: p.detach() for name, p in net.named_parameters()}
    grads = {name: torch.ones_like(params[name]) for name in lslr.names}
    updated = lslr.update(params, {**grads, lslr.names[0]: None}, 0)
    assert updated[lslr.names[0]] is params[lslr.names[0]]
    for name, rate in zip(lslr.names[1:], lslr.rates[1:, 0], strict=True):
        torch.testing.assert_close(updated[name], params[name] - rate)


@pytest.mark.parametrize("lr", [np.float32(0.5), torch.tensor(0.5), 0.5, 1])
def test_any_number_is_a_rate(net: nn.Module, lr: Any) -> None:
    assert torch.equal(mpp.LSLR(net, 2, lr).rates, torch.full((4, 2), float(lr)))


def test_a_table_that_the_model_holds_is_not_adapted() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    net.lslr = mpp.LSLR(net, 2)
    for adapt in (None, "*"):
        assert mpp.LSLR(net, 2, adapt=adapt).names == ("0.weight", "0.bias")
