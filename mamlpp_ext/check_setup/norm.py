"""Whether norm layers have rows for the inner steps, and whether a loop uses them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mamlpp_ext.checks import listing
from mamlpp_ext.lslr import LSLR
from mamlpp_ext.norm import convert_batchnorm
from mamlpp_ext.steps import per_step_layers, per_step_tables
from mamlpp_ext.torch_private import is_batch_norm


def about_norm(module: nn.Module, lslr: LSLR | None) -> list[str]:
    """Returns what is to say of norm layers: BNRS, BNWB, what is left over or used wrongly."""
    layers = per_step_layers(module)
    per_step = {name: layer for name, layer in layers.items() if layer.num_steps != 1}
    norms = {name: layer for name, layer in per_step.items() if hasattr(layer, "running_mean")}
    findings = [
        _about_part(norms, "BNRS", "statistics", "running_mean"),
        _about_part(norms, "BNWB", "weights and biases", "weight"),
    ]
    others = [name for name in per_step if name not in norms]
    if others:
        findings.append(
            f"on: per-step parameters of {len(others)} other layers ({listing(others)})"
        )
    findings += [*_about_plain(module), *_about_adapted_rows(module, lslr)]
    idle = [name for name, layer in per_step.items() if _first_row_alone(layer)]
    if idle:
        findings.append(
            f"problem: forwards have used the first row alone of {listing(idle)}; write the inner "
            "loop as 'for step in mamlpp_ext.inner_steps(model, num_steps)', which tells the layers"
        )
    for name, layer in per_step.items():
        if lslr is not None and layer.num_steps != lslr.num_steps:
            findings.append(
                f"problem: layer '{name}' has num_steps={layer.num_steps}, LSLR has "
                f"num_steps={lslr.num_steps}; build both with the number of inner steps"
            )
    return findings


def _about_part(norms: dict[str, Any], short: str, what: str, attribute: str) -> str:
    having = [name for name in norms if getattr(norms[name], attribute) is not None]
    said = f"per-step batch-norm {what} ({short}) in {len(having)} layers"
    untracked = [name for name in norms if not norms[name].track_running_stats]
    if not having and untracked and short == "BNRS":
        return (
            f"off: {said}, as {listing(untracked)} were built with track_running_stats=False; "
            "batch statistics are used in every mode. To keep running ones, build the norm layers "
            "with track_running_stats=True before the conversion"
        )
    return f"{'on' if having else 'off'}: {said}"


def _about_plain(module: nn.Module) -> list[str]:
    plain = {name: layer for name, layer in module.named_modules() if is_batch_norm(layer)}
    refused = {name: said for name, layer in plain.items() if (said := _refusal(layer))}
    convertible = [name for name in plain if name not in refused]
    findings = []
    if convertible:
        noun = "layer is" if len(convertible) == 1 else "layers are"
        findings.append(
            f"problem: {len(convertible)} plain BatchNorm {noun} left over "
            f"({listing(convertible)}); convert the model with convert_batchnorm"
        )
    if refused:
        reason = next(iter(refused.values()))
        kinds = ", ".join(sorted({type(plain[name]).__name__ for name in refused}))
        findings.append(
            f"problem: {listing([*refused])} ({kinds}) have no rows for the inner steps, and "
            "convert_batchnorm cannot give them any; put nn.BatchNorm layers in their place before "
            f"the conversion, which a forward calls without weights ({reason})"
        )
    return findings


def _refusal(layer: nn.Module) -> str:
    """Returns why a layer cannot be converted, or nothing: what is advised has to work."""
    try:
        convert_batchnorm(layer, 2)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _about_adapted_rows(module: nn.Module, lslr: LSLR | None) -> list[str]:
    if lslr is None:
        return []
    tables = per_step_tables(module).items()
    adapted = [name for name, table in tables if len(table) != 1 and name in lslr.names]
    slopes = lslr.rates.grad
    unused = [
        name
        for name in adapted
        if slopes is not None and not bool(slopes[lslr.names.index(name)].any())
    ]
    if unused:
        return [
            f"problem: LSLR has rates for rows of per-step layers ({listing(unused)}), but they "
            "got no gradient: the loop's own update leaves these rows alone, so the outer loop "
            "alone learns them; build the LSLR with adapt=None, or update every name in lslr.names"
        ]
    if adapted:
        return [
            f"on: the inner loop adapts rows of per-step layers, too ({listing(adapted)}), where "
            "its update takes them; for the outer loop to learn them alone, build the LSLR from "
            "the converted model with adapt=None"
        ]
    return []


def _first_row_alone(layer: Any) -> bool:
    counts = getattr(layer, "num_batches_tracked", None)
    return counts is not None and bool(counts[0] > 0) and not bool(counts[1:].any())
