"""MAML++ in the inner loops of ``higher``.

A *twin* is the patched copy that higher makes of a module; :mod:`~mamlpp_ext.integrations.twins`
completes it. What is used of higher 0.2.1, which is no longer maintained, and which
``tests/integrations/test_peers.py`` holds to it: ``monkeypatch``, ``get_diff_optim``,
``register_optim``, ``optim.DifferentiableOptimizer`` (its ``__init__``, ``step``, ``_update``,
``_apply_override``, ``param_groups``, ``_grad_callback``, ``_track_higher_grads``, ``_fmodel``,
``_group_to_param_list``), the patched module's ``fast_params``, and what ``twins`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import check_version, checked_loss, checked_order
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.integrations.attributes import AttributeCopies
from mamlpp_ext.integrations.buffers import BufferCopies, buffers_kept_on_error
from mamlpp_ext.integrations.exclusive import exclusive
from mamlpp_ext.integrations.lslr_optimizer import LSLROptimizer
from mamlpp_ext.integrations.twins import complete_twins
from mamlpp_ext.integrations.unpatched import refuse_loss_of_unpatched, refuse_unpatched
from mamlpp_ext.lslr import LSLR, support_gradients
from mamlpp_ext.steps import step_counters, steps_restored, with_order

try:
    import higher
except ImportError as error:
    raise ImportError(
        "mamlpp_ext.integrations.higher needs the package higher, which is not installed; "
        "pip install 'mamlpp_ext[higher]'"
    ) from error

check_version(__name__, "higher")

__all__ = ["DifferentiableLSLR", "LSLROptimizer", "innerloop_ctx"]


class DifferentiableLSLR(higher.optim.DifferentiableOptimizer):
    """The inner update with learned rates, as a differentiable optimizer of ``higher``.

    ``diffopt.step(loss)`` updates the patched model; the k-th call uses column k of the rates.
    Made by :func:`innerloop_ctx`, or by higher from an :class:`LSLROptimizer`.

    Args:
        other: the optimizer it takes rates and settings from.
        *args: as for ``higher.optim.DifferentiableOptimizer``.
        **kwargs: likewise.

    Raises:
        ValueError: for an ``override`` of anything but ``second_order``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with innerloop_ctx(net, LSLR(net, num_steps=5)) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 2)).sum())
        ...     fnet(torch.ones(1, 2)).requires_grad
        True

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of higher.
    """

    def __init__(self, other: LSLROptimizer, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self.lslr = other.lslr
        (group,) = other.param_groups
        self._initial = dict(zip(self.lslr.names, group["params"], strict=True))
        if self._fmodel is not None:
            self.twins = complete_twins(other.module, self._fmodel)
            patched = [twin for _, twin in self.twins.pairs]
            refuse_unpatched(self._fmodel, patched, self._initial)

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: dict[str, list[Any]] | None = None,
        grad_callback: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
        **kwargs: Any,
    ) -> Iterable[Tensor]:
        """Updates the patched model; arguments and result are higher's.

        Args:
            loss: the support loss, 0-dim.
            params: the parameters to differentiate by, if there is no patched model.
            override: settings of the parameter group, from this step on, e.g.
                ``{"second_order": [False]}``.
            grad_callback: applied before the update to the list of gradients, one for each of the
                model's parameters: zeros where nothing is adapted, None where none arrived.
            **kwargs: ignored; there because higher's own step takes them.

        Returns:
            The new parameters, in the order of ``module.parameters()``.

        Raises:
            RuntimeError: if ``loss`` has no graph, or depends on nothing that is adapted.
            TypeError: if it is no tensor.
            ValueError: after more steps than the rates have columns, or for an ``override`` of
                another setting.
        """
        if override is not None:
            self._apply_override(override)
        if params is None and self._fmodel is not None:
            params = self._fmodel.fast_params
        if params is None:
            raise ValueError(
                "DifferentiableLSLR.step got params=None and has no patched model to take them "
                "from; pass params, the list of the model's current parameters"
            )
        fast = list(params)
        (group,), (indices,) = self.param_groups, self._group_to_param_list
        # What is adapted, at which _update, as higher's own do, finds and leaves it.
        group["params"] = [fast[index] for index in indices]
        grads = self._grads(checked_loss(loss), group["params"])
        callback = grad_callback or self._grad_callback
        if callback is not None:  # higher hands it the gradients of all parameters
            every = [torch.zeros_like(p) for p in fast]  # 0 where nothing is adapted
            for index, grad in zip(indices, grads, strict=True):
                every[index] = grad
            every = list(callback(every))
            grads = [every[index] for index in indices]
        self._update([grads])
        for index, p in zip(indices, group["params"], strict=True):
            learns = fast[index].requires_grad  # else it was frozen since the rates were made
            fast[index] = p if self._track_higher_grads else p.detach().requires_grad_(learns)
        if self._fmodel is not None:
            self._fmodel.update_params(fast)
        return fast

    def _apply_override(self, override: dict[str, list[Any]]) -> None:
        unknown = sorted(set(override) - {"second_order"})
        if unknown:
            raise ValueError(
                f"override of {unknown} would have no effect on learned rates, legal is "
                "'second_order'; set the rates themselves in lslr.rates"
            )
        super()._apply_override(override)

    def _grads(self, loss: Tensor, params: list[Tensor]) -> list[Any]:
        # higher's own step differentiates by every parameter, and without a graph of the gradients
        # it detaches the new weights, so that no meta-gradient would reach the initial ones.
        (group,) = self.param_groups
        create_graph = group["second_order"] and self._track_higher_grads
        first = group["inner_step"] == 0
        grads = support_gradients(loss, params, create_graph=create_graph, first=first)
        if first and self._fmodel is not None and any(grad is None for grad in grads):
            named = zip(self._initial.items(), grads, strict=True)
            refuse_loss_of_unpatched(loss, dict(item for item, grad in named if grad is None))
        return grads

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        (group,), (grads,) = self.param_groups, grouped_grads
        params = dict(zip(self.lslr.names, group["params"], strict=True))
        named = dict(zip(self.lslr.names, grads, strict=True))
        group["params"] = list(self.lslr.update(params, named, group["inner_step"]).values())
        group["inner_step"] += 1


higher.register_optim(LSLROptimizer, DifferentiableLSLR)


@contextmanager
def innerloop_ctx(
    net: nn.Module, lslr: LSLR, *, second_order: bool = True, track_higher_grads: bool = True
) -> Iterator[tuple[Any, DifferentiableLSLR]]:
    """``higher.innerloop_ctx`` for MAML++: learned rates, first order, statistics written back.

    The initial weights are those of ``net`` itself, so that ``backward`` reaches them (higher's
    ``copy_initial_weights=False``); its test mode copies them. When the context ends, what the
    patched model changed of its buffers, such as running statistics, and of its plain attributes is
    written back to ``net``; when an exception ends it, nothing is.

    Args:
        net: the model.
        lslr: its rates.
        second_order: whether to differentiate through the inner gradients. First order keeps the
            meta-gradient to initial weights and rates and builds no graph of the gradients.
        track_higher_grads: False is higher's test mode: memory stays flat, no meta-gradient, and
            nothing of the task is written back.

    Yields:
        ``(fnet, diffopt)``: the patched model and its :class:`DifferentiableLSLR`.

    Raises:
        TypeError: if ``lslr`` is no :class:`~mamlpp_ext.LSLR`, or higher cannot patch ``net``.
        ValueError: if ``lslr`` was made for another model, ``net`` is patched already, or a hook of
            it refers to one of its modules through a global variable.
        RuntimeError: if another ``innerloop_ctx`` on ``net`` is open.

    Example:
        >>> import mamlpp_ext as mpp
        >>> net, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
        >>> with innerloop_ctx(net, mpp.LSLR(net, num_steps=2)) as (fnet, diffopt):
        ...     for step in mpp.inner_steps(fnet, 2):
        ...         _ = diffopt.step(nn.functional.mse_loss(fnet(x), y))
        ...     nn.functional.mse_loss(fnet(x), y).backward()
        >>> net.weight.grad.shape
        torch.Size([1, 3])

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of higher.
    """
    second_order = checked_order(second_order)
    optimizer, counters = LSLROptimizer(net, lslr, second_order), step_counters(net)
    with (
        exclusive(net),
        buffers_kept_on_error(net),
        steps_restored(counters),
        with_order(counters, second_order and track_higher_grads),
        twice_differentiable(net, second_order=second_order and track_higher_grads),
    ):
        fnet, diffopt = _patched(net, optimizer, track_higher_grads)
        copies = BufferCopies(diffopt.twins.pairs), AttributeCopies(diffopt.twins)
        yield fnet, diffopt
        diffopt.twins.memory.refuse_changed()
        if track_higher_grads:
            for kind in copies:
                kind.write_back()


def _patched(
    net: nn.Module, optimizer: LSLROptimizer, track_higher_grads: bool
) -> tuple[Any, DifferentiableLSLR]:
    """Returns what ``higher.innerloop_ctx`` yields."""
    tracking = {"track_higher_grads": track_higher_grads}
    try:
        fnet = higher.monkeypatch(net, copy_initial_weights=not track_higher_grads, **tracking)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise TypeError(
            f"higher cannot patch this {type(net).__name__} ({type(error).__name__}: {error}): "
            "higher makes a class for every layer and copies what the layer holds, which some "
            "(compiled, scripted, abstract, distributed) do not allow; use task_batch_loss or "
            "mamlpp_ext.integrations.torchopt, which patch nothing"
        ) from error
    return fnet, higher.get_diff_optim(optimizer, net.parameters(), fmodel=fnet, **tracking)
