"""Whether rates, model and meta-optimizer belong together, and gradients reach them."""

from __future__ import annotations

import torch
from torch import nn

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr import LSLR

_FIX_OPTIMIZER = "build it from [*module.parameters(), *lslr.parameters()] after the conversion"
_OWN_PARAMETERS = (
    "build it from [*dict(module.named_parameters()).values(), *lslr.parameters()] after the "
    "conversion, as this model's class overrides parameters(), which leaves some out"
)


def about_rates(module: nn.Module, lslr: LSLR | None) -> list[str]:
    """Returns what is to say of the inner rates: whether they learn, whose they are."""
    if lslr is None:
        return ["off: learned inner rates (LSLR)"]
    missing = [name for name in lslr.names if name not in dict(module.named_parameters())]
    inside = _wrapped(module, lslr) if missing else None
    if inside:
        return [
            f"problem: LSLR adapts {listing(missing)}, which stand in this "
            f"{type(module).__name__} under '{inside}.'; pass the model inside of the wrapper, "
            f"check_setup(wrapper.{inside}, lslr, ...)"
        ]
    if missing:
        return [
            f"problem: LSLR adapts {listing(missing)}, which the model does not have; build it "
            "from this model"
        ]
    tensors = f"{len(lslr.names)} tensors over {lslr.num_steps} steps"
    if not lslr.rates.requires_grad:
        return [f"off: learned inner rates (LSLR); the rates of {tensors} are fixed"]
    return [f"on: learned inner rates (LSLR), {lslr.rates.numel()} rates for {tensors}"]


def _wrapped(module: nn.Module, lslr: LSLR) -> str | None:
    """Returns the name under which a wrapper holds the model of these rates, or None."""
    every = {id(p) for p in module.parameters()} - {id(lslr.rates)}
    children: list[tuple[str, nn.Module]] = list(module.named_modules())
    for name, child in children:
        own = dict(child.named_parameters())
        if name and own.keys() >= set(lslr.names) and every <= {id(p) for p in own.values()}:
            return name
    return None


def about_optimizer(
    module: nn.Module, lslr: LSLR | None, optimizer: torch.optim.Optimizer | None
) -> list[str]:
    """Returns what the meta-optimizer lacks."""
    if optimizer is None:
        return []
    fix = _OWN_PARAMETERS if _overrides_parameters(module) else _FIX_OPTIMIZER
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    findings = []
    if lslr is not None and lslr.rates.requires_grad and id(lslr.rates) not in held:
        findings.append(
            "problem: the rates of LSLR are not in the meta-optimizer and will never change; " + fix
        )
    named = module.named_parameters()
    outside = [name for name, p in named if p.requires_grad and id(p) not in held]
    if outside:
        findings.append(
            f"problem: {len(outside)} parameters of the model are not in the meta-optimizer "
            f"({listing(outside)}); {fix}"
        )
    return findings


def _overrides_parameters(module: nn.Module) -> bool:
    return type(module).parameters is not nn.Module.parameters


def about_gradients(module: nn.Module, lslr: LSLR | None) -> list[str]:
    """Returns which parameters the last backward did not reach."""
    named = dict(module.named_parameters())
    if lslr is not None:
        named["the rates of LSLR"] = lslr.rates
    trained = {name: p for name, p in named.items() if p.requires_grad}
    unreached = [name for name, p in trained.items() if p.grad is None]
    if len(unreached) in (0, len(trained)):  # none at all: backward has not been called yet
        return []
    return [
        f"problem: no gradient reaches {listing(unreached)}; use it in forward, freeze it with "
        "requires_grad_(False), or look for a detach() on its way to the loss"
    ]
