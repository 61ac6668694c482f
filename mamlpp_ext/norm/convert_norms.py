"""Turns the norm layers of a model into per-step ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from mamlpp_ext.checks import ExtraSteps
from mamlpp_ext.norm.any_layer import check_owners, give_rows
from mamlpp_ext.norm.convert_batch_norm import check_convertible, convert_copy
from mamlpp_ext.norm.instance_norm import become_per_step_instance_norm, is_instance_norm
from mamlpp_ext.norm.references import copied
from mamlpp_ext.norm.tables import checked_settings
from mamlpp_ext.steps import per_step_layers, per_step_tables
from mamlpp_ext.torch_private import held, is_batch_norm, keeps_statistics

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def convert_norm(
    module: nn.Module, num_steps: int, *, extra_steps: ExtraSteps = "error"
) -> nn.Module:
    """Returns a copy of ``module`` whose norm layers have a row for every inner step.

    BatchNorm becomes what :func:`convert_batchnorm` makes of it. The weights and biases of
    LayerNorm, GroupNorm, RMSNorm and InstanceNorm, and of their subclasses, get rows as
    :func:`per_step_parameters` gives them; an InstanceNorm's running statistics get rows with them.
    The copy computes what the original does until it is trained. Norms of other libraries, which
    are not made of torch's, are chosen by name: ``per_step_parameters(net, 5, ["*norm.weight"])``.

    Args:
        module: the model; it is left as it is.
        num_steps: the number of inner steps, i.e. rows.
        extra_steps: what happens at steps beyond ``num_steps``: ``"error"`` raises, ``"last"``
            reuses the last row.

    Returns:
        The converted copy.

    Raises:
        TypeError: if ``module`` is no module or ``num_steps`` no whole number.
        ValueError: if ``num_steps`` is below 1, there is no such layer that has anything to give
            rows to, or one cannot be expressed, as :func:`convert_batchnorm` and
            :func:`per_step_parameters` say.

    Example:
        >>> net = convert_norm(nn.TransformerEncoderLayer(8, 2, 16), num_steps=5)
        >>> net.norm1.weight.shape
        torch.Size([5, 8])

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4 (BNRS and BNWB), which has
        rows for batch norm alone.
    """
    settings = checked_settings("convert_norm", module, num_steps, extra_steps)
    for name, layer in module.named_modules():
        _check_instance_norm(layer, name)
    names = _weights_and_biases(module)
    instance_norms = [name for name, layer in module.named_modules() if is_instance_norm(layer)]
    batch_norms = any(is_batch_norm(layer) for layer in module.modules())
    if batch_norms:
        check_convertible(module)
    elif not names and not instance_norms:
        found = (
            "only per-step layers: it is converted already" if per_step_layers(module) else "none"
        )
        raise ValueError(
            f"{type(module).__name__} has no norm layer of torch's with weights, biases or running "
            f"statistics to give rows to ({found}); for those of other libraries use "
            "per_step_parameters, or leave this call out"
        )
    check_owners(module, names, settings)
    converted = copied(module)  # a failure below leaves no trace
    give_rows(converted, names, settings)
    for name in instance_norms:
        become_per_step_instance_norm(converted.get_submodule(name), *settings)
    return convert_copy(converted, *settings) if batch_norms else converted


def _weights_and_biases(module: nn.Module) -> list[str]:
    """Returns the names of those that norms read by themselves and that have no rows yet."""
    done = {id(table) for table in per_step_tables(module).values()}
    wanted = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, _NORMS) and not keeps_statistics(layer)
        for key, p in held(layer, "parameters").items()
        if key in ("weight", "bias") and p is not None and id(p) not in done
    }
    return [name for name, p in module.named_parameters() if id(p) in wanted]


def _check_instance_norm(layer: Any, name: str) -> None:
    where = f"'{name or '(root)'}' ({type(layer).__name__})"
    if not keeps_statistics(layer) or is_batch_norm(layer):
        return
    if not is_instance_norm(layer):
        raise ValueError(
            f"{where} is of a subclass of InstanceNorm and keeps running statistics, which only "
            "torch's own can have rows for; replace it with one of these, or build it with "
            "track_running_stats=False"
        )
    if not layer.track_running_stats:
        raise ValueError(
            f"{where} has track_running_stats=False with running buffers; make the flag and the "
            "buffers agree first"
        )
