"""The inner update with learned rates as a torch optimizer, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mamlpp_ext.lslr import LSLR, checked_lslr


class LSLROptimizer(torch.optim.Optimizer):
    """The torch optimizer that ``higher`` turns into :class:`~.higher.DifferentiableLSLR`.

    Pass it to ``higher.innerloop_ctx`` where code is built around that function; otherwise
    :func:`~.higher.innerloop_ctx` makes it and keeps the running statistics as well. On its own it
    updates in place, without a graph, the k-th :meth:`step` with column k.

    Args:
        module: the model.
        lslr: its rates.
        second_order: whether to differentiate through the inner gradients; a setting of the
            parameter group, which higher's ``override`` can change.

    Raises:
        TypeError: if ``lslr`` is no :class:`~mamlpp_ext.LSLR`, or the model a DataParallel over
            several devices.
        ValueError: if ``lslr`` was made for another model, or the model is patched already.

    Example:
        >>> import higher
        >>> import mamlpp_ext.integrations.higher  # which tells higher of it
        >>> net = nn.Linear(2, 1)
        >>> inner_opt = LSLROptimizer(net, LSLR(net, num_steps=5))
        >>> context = higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False)
        >>> with context as (fnet, diffopt):
        ...     type(diffopt).__name__
        'DifferentiableLSLR'

    Source:
        The update of :class:`~mamlpp_ext.LSLR`, in the manners of higher.
    """

    def __init__(self, module: nn.Module, lslr: LSLR, second_order: bool = True) -> None:
        self.lslr, self.module = checked_lslr(lslr), module
        params = list(lslr.parameters_of(module).values())
        if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in module.modules()):
            raise TypeError(
                "DataParallel would copy layers that higher has patched to other devices, where "
                "they find no weights; pass the model in it, its .module"
            )
        # The rates stay out of the group: higher copies groups deeply, which cuts a learnable rate
        # off its leaf. The position in the inner loop is in it, so that higher takes it over.
        super().__init__(params, {"second_order": second_order, "inner_step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters in place from their ``.grad``.

        Args:
            closure: computes the loss again, as torch's optimizers take it; None for none.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: after more steps than the rates have columns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        params = dict(zip(self.lslr.names, group["params"], strict=True))
        grads = {name: p.grad for name, p in params.items()}
        updated = self.lslr.update(params, grads, group["inner_step"])
        for name, p in params.items():
            p.copy_(updated[name])
        group["inner_step"] += 1
        return loss
