"""check_setup says what is on, what is off and what cannot work; it raises nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

PARTS = ("(MSL)", "(DA)", "(BNRS)", "(BNWB)", "(LSLR)", "(CA)")


def check(net: nn.Module, lslr: mpp.LSLR | None, optimizer: Any = None, **parts: Any) -> list[str]:
    findings = mpp.check_setup(net, lslr, optimizer, **parts)
    assert all(f.startswith(("on: ", "off: ", "problem: ", "warning: ")) for f in findings)
    return findings


def problems(findings: list[str]) -> list[str]:
    return [finding for finding in findings if finding.startswith("problem: ")]


def adam(*modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr=1e-3)


def test_everything_on(net: nn.Module, lslr: mpp.LSLR) -> None:
    optimizer = adam(net, lslr)
    findings = check(
        net,
        lslr,
        optimizer,
        multi_step_loss=mpp.MultiStepLoss(3, 10),
        derivative_order=mpp.DerivativeOrderAnnealing(50),
        meta_scheduler=CosineAnnealingLR(optimizer, 100, eta_min=1e-5),
    )
    assert not problems(findings)
    for part in PARTS:
        assert [f.partition(":")[0] for f in findings if part in f] == ["on"], part


def test_everything_off() -> None:
    """A configuration that says MAML++ with its parts off is plain MAML, and is told so."""
    findings = check(nn.Linear(3, 2), None)
    assert not problems(findings)
    for part in PARTS:
        assert [f.partition(":")[0] for f in findings if part in f] == ["off"], part


@pytest.mark.parametrize(
    ("change", "off"),
    [
        (lambda net: {"multi_step_loss": mpp.FinalStepLoss()}, "(MSL)"),
        (lambda net: {"meta_scheduler": StepLR(adam(net), 5)}, "(CA)"),
        (lambda net: net.norm.register_parameter("weight", None), "(BNWB)"),
        (lambda net: net.norm.register_buffer("running_mean", None), "(BNRS)"),
    ],
    ids=["final step", "another scheduler", "no weights", "no statistics"],
)
def test_one_part_off(net: nn.Module, change: Callable[[nn.Module], Any], off: str) -> None:
    parts = change(net)
    findings = check(net, None, **(parts if isinstance(parts, dict) else {}))
    assert [f.partition(":")[0] for f in findings if off in f] == ["off"]


def test_one_row_for_all_steps_counts_as_off() -> None:
    plain = mpp.convert_batchnorm(nn.BatchNorm1d(3), 1, extra_steps="last")
    findings = check(plain, None)
    assert [f.partition(":")[0] for f in findings if "(BNRS)" in f] == ["off"]
    assert not problems(findings)


def test_fixed_rates_are_off(net: nn.Module) -> None:
    lslr = mpp.LSLR(net, 3, learnable=False)
    findings = check(net, lslr, adam(net))  # nothing to put into the meta-optimizer
    assert not problems(findings)
    assert [f for f in findings if "LSLR" in f and f.startswith("off: ") and "fixed" in f]


def plain_layers(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    net.extra = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
    return check(net, lslr)


def rates_left_out(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, lslr, adam(net))


def parameters_left_out(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, lslr, adam(net.body, net.norm, lslr))


def optimizer_of_the_original(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    plain = nn.Sequential(nn.BatchNorm1d(3))
    return check(mpp.convert_batchnorm(plain, 3), None, adam(plain))


def other_steps_in_the_layers(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, mpp.LSLR(net, 5))


def other_steps_in_the_losses(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, lslr, multi_step_loss=mpp.MultiStepLoss(5, 10))


def losses_annealed_at_once(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, lslr, multi_step_loss=mpp.MultiStepLoss(3, 0))


def flat_cosine(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, lslr, meta_scheduler=CosineAnnealingLR(adam(net), 10, eta_min=1e-3))


def another_models_rates(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    return check(net, mpp.LSLR(nn.Bilinear(2, 2, 2), 3))


def parameters_unreached(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    net(torch.randn(5, 3)).sum().backward()
    net.spare = nn.Linear(2, 2)
    return check(net, None)


def rates_unreached(net: nn.Module, lslr: mpp.LSLR) -> list[str]:
    net(torch.randn(5, 3)).sum().backward()  # the update was left out
    return check(net, lslr)


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (
            plain_layers,
            ("2 plain BatchNorm layers are left over", "'extra.0'", "convert_batchnorm"),
        ),
        (rates_left_out, ("rates of LSLR are not in the meta-optimizer", "lslr.parameters()")),
        (
            parameters_left_out,
            ("2 parameters", "'head.weight', 'head.bias'", "module.parameters()"),
        ),
        (optimizer_of_the_original, ("2 parameters", "not in the meta-optimizer", "conversion")),
        (other_steps_in_the_layers, ("layer 'norm' has num_steps=3", "LSLR has num_steps=5")),
        (other_steps_in_the_losses, ("MultiStepLoss has num_steps=5", "LSLR has num_steps=3")),
        (losses_annealed_at_once, ("multi-step loss", "0 epochs", "anneal_epochs=10")),
        (flat_cosine, ("starts and ends at 0.001", "eta_min")),
        (another_models_rates, ("LSLR adapts 'weight', 'bias'", "build it from this model")),
        (parameters_unreached, ("no gradient reaches 'spare.weight', 'spare.bias'", "freeze it")),
        (rates_unreached, ("no gradient reaches 'the rates of LSLR'", "detach()")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_problems(
    net: nn.Module, lslr: mpp.LSLR, setup: Callable[..., list[str]], words: tuple[str, ...]
) -> None:
    found = problems(setup(net, lslr))
    assert [f for f in found if all(word in f for word in words)], found


def test_no_first_order_epochs_are_second_order_from_the_start(net: nn.Module) -> None:
    da = mpp.DerivativeOrderAnnealing(0)
    assert da.second_order
    (finding,) = [f for f in check(net, None, derivative_order=da) if "(DA)" in f]
    assert finding.startswith("off: ")
    assert "first_order_epochs=0 second order from the start" in finding


def test_gradients_are_judged_after_a_backward_only(
    net: nn.Module, lslr: mpp.LSLR, tasks: tuple[Tensor, ...]
) -> None:
    assert not problems(check(net, lslr, adam(net, lslr)))
    loss_fn = nn.functional.cross_entropy
    mpp.task_batch_loss(net, lslr, tasks, loss_fn, num_steps=3).loss.backward()
    assert not problems(check(net, lslr, adam(net, lslr)))


def test_nothing_is_changed(net: nn.Module, lslr: mpp.LSLR, unchanged: Any) -> None:
    optimizer = adam(net, lslr)
    with unchanged(net), unchanged(lslr):
        check(net, lslr, optimizer, multi_step_loss=mpp.MultiStepLoss(3, 10))


def test_a_loop_that_does_not_tell_the_layers(net: nn.Module, lslr: mpp.LSLR) -> None:
    x, expected = torch.randn(5, 3), "the first row alone"
    assert not any(expected in finding for finding in check(net, lslr))
    for _ in range(3):
        net(x)
    assert any(expected in finding for finding in problems(check(net, lslr)))
    for _ in mpp.inner_steps(net, 3):
        net(x)
    assert not any(expected in finding for finding in check(net, lslr))


def test_rates_of_rows_that_the_outer_loop_was_to_learn() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net, before = mpp.convert_batchnorm(plain, 3), mpp.LSLR(plain, 3)  # the wrong way round
    found = [finding for finding in check(net, before) if "adapts rows" in finding]
    assert "'1.weight'" in found[0]
    assert not any("adapts rows" in finding for finding in check(net, mpp.LSLR(net, 3)))


class Wrapper(nn.Module):
    """As learn2learn's MAML holds its model, and the rates beside it."""

    def __init__(self, module: nn.Module, lr: Any = None) -> None:
        super().__init__()
        self.module, self.lr = module, lr


@pytest.mark.parametrize("holds_rates", [False, True])
def test_a_wrapper_is_told_to_pass_its_model(
    net: nn.Module, lslr: mpp.LSLR, holds_rates: bool
) -> None:
    maml = Wrapper(net, lslr if holds_rates else None)
    (problem,) = problems(check(maml, lslr))
    assert "under 'module.'" in problem
    assert "check_setup(wrapper.module, lslr, ...)" in problem
    assert not problems(check(maml.module, lslr))


def test_norms_without_running_statistics_say_why() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    (finding,) = [f for f in check(mpp.convert_batchnorm(plain, 3), None) if "(BNRS)" in f]
    assert finding.startswith("off: ")
    for words in ("'1'", "track_running_stats=False", "track_running_stats=True before the conv"):
        assert words in finding


class MetaBatchNorm1d(nn.BatchNorm1d):
    """As torchmeta's: weights may be given to its forward."""

    def forward(self, input: Tensor, params: Any = None) -> Tensor:
        params = dict(self.named_parameters()) if params is None else params
        return nn.functional.batch_norm(
            input, None, None, params["weight"], params["bias"], training=True
        )


def test_what_is_advised_works() -> None:
    """Of a layer that convert_batchnorm refuses, nobody is told to convert it."""
    net = nn.Sequential(nn.Linear(3, 4), MetaBatchNorm1d(4))
    (problem,) = problems(check(net, None))
    with pytest.raises(ValueError, match="'1'"):
        mpp.convert_batchnorm(net, 3)
    assert "'1' (MetaBatchNorm1d) have no rows" in problem
    assert "put nn.BatchNorm layers in their place" in problem
    net[1] = nn.BatchNorm1d(4)
    assert not problems(check(mpp.convert_batchnorm(net, 3), None))


def test_rows_that_the_loop_never_updates(net: nn.Module, task: tuple[Tensor, ...]) -> None:
    """Such as in torchmeta, whose update sees the parameters of its own modules alone."""
    x, y, *_ = task
    lslr = mpp.LSLR(net, 3, adapt="*")
    assert [f for f in check(net, lslr) if "inner loop adapts rows" in f and f.startswith("on: ")]
    params, rates = dict(net.named_parameters()), lslr.rates_at(0)
    seen = [name for name in params if not name.startswith("norm")]
    loss = nn.functional.cross_entropy(mpp.functional_call(net, params, x), y)
    grads = torch.autograd.grad(loss, [params[name] for name in seen], create_graph=True)
    adapted = {n: params[n] - rates[n] * g for n, g in zip(seen, grads, strict=True)}
    mpp.functional_call(net, {**params, **adapted}, x).square().mean().backward()
    (problem,) = [f for f in problems(check(net, lslr)) if "rows" in f]
    assert "'norm.weight', 'norm.bias'" in problem
    assert "adapt=None" in problem


class OwnParameters(nn.Sequential):
    """A functional net that hands out its list of weights alone."""

    def parameters(self, recurse: bool = True) -> Any:
        return iter([*self[0].parameters(recurse)])


def test_a_model_that_overrides_parameters() -> None:
    plain = OwnParameters(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = mpp.convert_batchnorm(plain, 3)
    lslr = mpp.LSLR(net, 3)
    optimizer = torch.optim.Adam([*net.parameters(), *lslr.parameters()])
    (problem,) = problems(check(net, lslr, optimizer))
    assert "'1.weight', '1.bias'" in problem
    assert "overrides parameters()" in problem
    advised = [*dict(net.named_parameters()).values(), *lslr.parameters()]
    assert "[*dict(module.named_parameters()).values(), *lslr.parameters()]" in problem
    assert not problems(check(net, lslr, torch.optim.Adam(advised)))


def at_rest(parts: dict[str, Any]) -> list[str]:
    return problems(check(nn.Linear(2, 2), None, **parts))


def cosine(epochs: int) -> CosineAnnealingLR:
    return CosineAnnealingLR(adam(nn.Linear(2, 2)), epochs, eta_min=1e-5)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"derivative_order": mpp.DerivativeOrderAnnealing(1000), "meta_scheduler": cosine(19)},
            ("first order for 1000 epochs", "T_max=19", "second order never", "for_run(19)"),
        ),
        (
            {"derivative_order": mpp.DerivativeOrderAnnealing(20), "run_epochs": 20},
            ("first order for 20 epochs", "run_epochs=20", "second order never comes"),
        ),
        (
            {"multi_step_loss": mpp.MultiStepLoss(5, 10), "meta_scheduler": cosine(10)},
            ("annealed over 10 epochs", "T_max=10", "never counts alone", "for_run(5, 10)"),
        ),
        ({"meta_scheduler": cosine(10), "run_epochs": 30}, ("T_max=10", "rises again")),
        ({"meta_scheduler": cosine(90), "run_epochs": 30}, ("T_max=90", "stays high to the end")),
    ],
)
def test_schedules_against_each_other(parts: dict[str, Any], words: tuple[str, ...]) -> None:
    (problem,) = at_rest(parts)
    assert not [word for word in words if word not in problem], problem


def test_schedules_that_fit() -> None:
    msl, da = mpp.MultiStepLoss.for_run(5, 20), mpp.DerivativeOrderAnnealing.for_run(20)
    parts = {"multi_step_loss": msl, "derivative_order": da, "meta_scheduler": cosine(19)}
    assert not at_rest(parts)
    assert not at_rest({**parts, "run_epochs": 20})
    del parts["meta_scheduler"]
    assert not at_rest(parts)
