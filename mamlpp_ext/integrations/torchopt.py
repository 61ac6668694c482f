"""MAML++ in the inner loops of ``torchopt``.

What it touches of torchopt 0.7.3 (``tests/integrations/test_peers.py`` holds it): ``MetaOptimizer``
(its ``__init__``, ``step``, ``impl``, ``state_groups``), ``base.GradientTransformation``,
``base.UninitializedState``, ``extract_state_dict``, ``recover_state_dict``, and of ``pytree``
``tree_flatten``, ``tree_unflatten``, ``tree_paths``, ``tree_leaves``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import check_version, checked_loss, checked_order
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.integrations.buffers import buffers_kept_on_error
from mamlpp_ext.integrations.exclusive import exclusive
from mamlpp_ext.lslr import LSLR, check_reached, checked_lslr, support_gradients
from mamlpp_ext.steps import step_counters, steps_restored, with_order
from mamlpp_ext.torch_private import held

try:
    import torchopt
    from torchopt import pytree
    from torchopt.base import GradientTransformation, UninitializedState
except ImportError as error:
    raise ImportError(
        "mamlpp_ext.integrations.torchopt needs the package torchopt, which is not installed; "
        "pip install 'mamlpp_ext[torchopt]'"
    ) from error

check_version(__name__, "torchopt")

__all__ = ["LSLRState", "MetaLSLR", "innerloop_ctx", "lslr_transform"]


class LSLRState(NamedTuple):
    """The state of :func:`lslr_transform`.

    Attributes:
        step: the next inner step, 0-based.
        names: under which name each leaf of the parameters is adapted, None for those that are not.
    """

    step: int
    names: tuple[str | None, ...]


def lslr_transform(lslr: LSLR) -> GradientTransformation:
    """The inner update with learned rates as a gradient transformation.

    Chains with others, e.g. after clipping:
    ``torchopt.chain(torchopt.clip.clip_grad_norm(1.0), lslr_transform(lslr))``. The parameters may
    be a dict by name (``dict(net.named_parameters())``), or the flat tuple of MetaOptimizer, paired
    with the rates by tensor identity: torchopt flattens ``bias`` before ``weight``.

    Args:
        lslr: the rates.

    Returns:
        A transformation whose k-th update after ``init`` uses column k. Parameters that are not
        adapted get the update None and stay as they are.

    Raises:
        ValueError: from ``init``, if parameters cannot be told by name or identity, or are tied;
            from ``update``, after more steps than there are columns.
        RuntimeError: from ``update``, if every gradient is None.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> transform, params = lslr_transform(LSLR(net, num_steps=5)), dict(net.named_parameters())
        >>> state = transform.init(params)
        >>> grads = {name: torch.ones_like(p) for name, p in params.items()}
        >>> updates, state = transform.update(grads, state, params=params, inplace=False)
        >>> state.step
        1

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of torchopt.
    """

    def init(params: Any) -> LSLRState:
        return LSLRState(step=0, names=_names_of(lslr, params))

    def update(
        updates: Any, state: LSLRState, *, params: Any = None, inplace: bool = True
    ) -> tuple[Any, LSLRState]:
        # Out of place whatever `inplace` says: that is a permission, and autograd needs the grads.
        grads, spec = pytree.tree_flatten(updates, none_is_leaf=True)
        found = {n: g for n, g in zip(state.names, grads, strict=True) if n and g is not None}
        check_reached(lslr.names, found, state.step)
        rates = lslr.rates_at(state.step)
        # An Embedding(sparse=True) has sparse gradients, which a rate has no derivative by.
        dense = {n: g if g.layout == torch.strided else g.to_dense() for n, g in found.items()}
        scaled = [-rates[name] * dense[name] if name in dense else None for name in state.names]
        return pytree.tree_unflatten(spec, scaled), state._replace(step=state.step + 1)

    return GradientTransformation(init, update)


def _names_of(lslr: LSLR, params: Any) -> tuple[str | None, ...]:
    leaves = zip(pytree.tree_paths(params), pytree.tree_leaves(params), strict=True)
    keys = [(".".join(map(str, path)), leaf) for path, leaf in leaves]
    names = [key if key in lslr.names else lslr.name_of(leaf) for key, leaf in keys]
    missing = [name for name in lslr.names if name not in names]
    if missing:
        raise ValueError(
            f"cannot tell which of the {len(names)} parameters passed to init are {missing}: they "
            "are neither keys nor the tensors the LSLR was made from; pass a dict by name, such as "
            "dict(net.named_parameters()), and build the LSLR from this very model"
        )
    twice = sorted({name for name in names if name is not None and names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{twice} stand in several places of the parameters passed to init, and torchopt would "
            "update each place by its own share of the gradient; use MetaLSLR, which adapts tied "
            "parameters as one"
        )
    return tuple(names)


class MetaLSLR(torchopt.MetaOptimizer):
    """The inner update with learned rates as a ``torchopt.MetaOptimizer``.

    ``inner_opt.step(loss)`` adapts the model in place; the k-th call uses column k of the rates.
    The count travels in the optimizer's state, so torchopt's ``extract_state_dict`` and
    ``recover_state_dict`` rewind it. Extract the *model's* state with ``by="reference",
    with_buffers=False``: with buffers, recovering would also take back the running statistics.

    Args:
        net: the model, holding its parameters (not adapted weights).
        lslr: its rates.
        second_order: whether to differentiate through the inner gradients.

    Attributes:
        second_order: as the argument; may be set at any time between steps.

    Raises:
        TypeError: if ``lslr`` is no :class:`~mamlpp_ext.LSLR`, or a layer is scripted.
        ValueError: if ``lslr`` was made for another model, or ``net`` is inside an inner loop.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> lslr = LSLR(net, num_steps=5)
        >>> inner_opt = MetaLSLR(net, lslr)
        >>> state = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
        >>> inner_opt.step(net(torch.ones(1, 2)).sum())
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> torchopt.recover_state_dict(net, state)
        >>> lslr.rates.grad.shape
        torch.Size([2, 5])

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of torchopt.
    """

    def __init__(self, net: nn.Module, lslr: LSLR, second_order: bool = True) -> None:
        parameters = checked_lslr(lslr).parameters_of(net)
        super().__init__(net, lslr_transform(lslr))
        self.lslr, self.second_order = lslr, second_order
        names = {id(p): name for name, p in parameters.items()}
        # A parameter tied to several places is adapted in all of them.
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {n: [] for n in parameters}
        for path, module in net.named_modules():
            own = held(module, "parameters")
            if not isinstance(own, dict):
                raise TypeError(
                    f"'{path}' ({type(module).__name__}) is scripted and takes no other weights "
                    "from torchopt; use task_batch_loss, or the layer it was made of"
                )
            for key, p in own.items():
                if id(p) in names:
                    self._places[names[id(p)]].append((own, key))

    def step(self, loss: Tensor) -> None:
        """Updates the model's adapted weights; torchopt's own always keeps the graph of gradients.

        Args:
            loss: the support loss, 0-dim.

        Raises:
            RuntimeError: if ``loss`` has no graph, or depends on nothing that is adapted.
            TypeError: if it is no tensor.
            ValueError: after more steps than the rates have columns.
        """
        params = {name: places[0][0][places[0][1]] for name, places in self._places.items()}
        state: Any = self.state_groups[0]
        first = isinstance(state, UninitializedState)
        state = self.impl.init(params) if first else state
        grads = support_gradients(
            checked_loss(loss), [*params.values()], create_graph=self.second_order, first=first
        )
        updated = self.lslr.update(params, grads, state.step)
        self.state_groups[0] = state._replace(step=state.step + 1)
        for name, places in self._places.items():
            for container, key in places:
                container[key] = updated[name]


@contextmanager
def innerloop_ctx(net: nn.Module, lslr: LSLR, *, second_order: bool = True) -> Iterator[MetaLSLR]:
    """An inner loop on ``net`` itself, with the manners of ``higher.innerloop_ctx``.

    Inside, ``inner_opt.step(loss)`` adapts ``net`` in place; on exit its weights are the
    meta-parameters again, and its buffers as the loop left them (after an exception, as before it).

    Args:
        net: the model.
        lslr: its rates.
        second_order: whether to differentiate through the inner gradients. First order keeps the
            meta-gradient to initial weights and rates and builds no graph of the gradients.

    Yields:
        The :class:`MetaLSLR` of this inner loop.

    Raises:
        TypeError: if ``lslr`` is no :class:`~mamlpp_ext.LSLR`, or a layer is scripted.
        ValueError: if ``lslr`` was made for another model, or ``net`` holds adapted weights.
        RuntimeError: if another ``innerloop_ctx`` on ``net`` is open.

    Example:
        >>> import mamlpp_ext as mpp
        >>> net, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
        >>> with innerloop_ctx(net, mpp.LSLR(net, num_steps=2)) as inner_opt:
        ...     for step in mpp.inner_steps(net, 2):
        ...         inner_opt.step(nn.functional.mse_loss(net(x), y))
        ...     nn.functional.mse_loss(net(x), y).backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of higher.
    """
    inner_opt, counters = MetaLSLR(net, lslr, checked_order(second_order)), step_counters(net)
    weights = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    try:
        with (
            exclusive(net),
            buffers_kept_on_error(net),
            steps_restored(counters),
            with_order(counters, second_order),
            twice_differentiable(net, second_order=second_order),
        ):
            yield inner_opt
    finally:
        torchopt.recover_state_dict(net, weights)
