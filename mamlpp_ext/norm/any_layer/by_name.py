"""Gives parameters, chosen by name, a row for every inner step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from mamlpp_ext.checks import ExtraSteps, chosen_names, listing
from mamlpp_ext.norm.any_layer.give_rows import check_owners, give_rows
from mamlpp_ext.norm.references import copied
from mamlpp_ext.norm.tables import checked_settings
from mamlpp_ext.steps import per_step_tables


def per_step_parameters(
    module: nn.Module,
    num_steps: int,
    names: Callable[[str], bool] | Iterable[str],
    *,
    extra_steps: ExtraSteps = "error",
) -> nn.Module:
    """Returns a copy of ``module`` in which some parameters have a row for every inner step.

    A forward at inner step i uses row i of the table [num_steps, ...] that takes the parameter's
    place. Every row starts with the parameter's value, so that the copy computes what the original
    does until it is trained. The outer loop learns the rows; :class:`LSLR` leaves them out unless
    its ``adapt`` asks for them. This is what the paper does for batch norm (BNWB), for any layer.

    The copy's layer is of a subclass of its own class: hooks, mode, dtype, device, sharing and
    ``requires_grad`` stay, and a checkpoint of the plain model loads into all rows. Make the
    optimizer afterwards, from the copy's parameters. The layer's own calls read a row, and those of
    the module that holds it; read from elsewhere ``layer.weight`` is the table.

    Args:
        module: the model; it is left as it is.
        num_steps: the number of inner steps, i.e. rows.
        names: which parameters, among those that require grad and have no rows yet: a callable of
            the name, or fnmatch patterns (``["*.norm.weight"]``), as ``adapt`` of :class:`LSLR`.
        extra_steps: what happens at steps beyond ``num_steps``: ``"error"`` raises, ``"last"``
            reuses the last row.

    Returns:
        The converted copy.

    Raises:
        TypeError: if ``module`` is no module, ``num_steps`` no whole number, or ``names`` of
            another form.
        ValueError: if ``num_steps`` is below 1, a pattern matches nothing, or a parameter cannot
            have rows: of a recurrent layer, of a norm with running statistics
            (:func:`convert_norm` gives it rows), lazy, scripted, or with sparse gradients.

    Example:
        >>> net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> net = per_step_parameters(net, num_steps=5, names=["1.bias"])
        >>> net[1].bias.shape
        torch.Size([5, 2])

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4 (BNWB), which has rows for
        batch norm alone.
    """
    settings = checked_settings("per_step_parameters", module, num_steps, extra_steps)
    tables = {id(table) for table in per_step_tables(module).values()}
    free = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in tables]
    chosen = chosen_names("names", names, free)
    if not chosen:
        raise ValueError(
            f"names={names!r} chooses no parameter of {type(module).__name__}; those that require "
            f"grad and have no rows yet: {listing(free)}"
        )
    check_owners(module, chosen, settings)
    converted = copied(module)  # a failure below leaves no trace
    give_rows(converted, chosen, settings)
    return converted
