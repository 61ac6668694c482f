"""Learned inner rates: one for every adapted tensor and inner step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import ExtraSteps, checked_count, checked_extra_steps, listing, select_row
from mamlpp_ext.fast_kernels import check_second_derivatives
from mamlpp_ext.lslr.adapted import Adapt, parameters_named, select_parameters
from mamlpp_ext.lslr.given import Grads, by_name
from mamlpp_ext.lslr.update import check_reached, check_shapes, descend


class LSLR(nn.Module):
    """Learned per-layer per-step learning rates, and the inner update that uses them.

    For adapted tensor j at inner step i, with gradient g:

        theta[j] <- theta[j] - rates[j, i] * g[j]

    The sign of a rate is free, so that the direction is learned too.

    Args:
        module: the model whose parameters the inner loop adapts.
        num_steps: the number of inner steps, i.e. columns.
        lr: the initial value of every rate, in units of parameter per gradient.
        adapt: what the inner loop adapts. None: every parameter that requires grad except those of
            per-step layers, which the outer loop alone learns. Otherwise a callable of the name,
            or fnmatch patterns (``["head.*"]``, ``["*"]``), chosen among all that require grad.
        learnable: whether the rates require grad; without, this is SGD with the rate ``lr``.
        extra_steps: what happens at steps beyond ``num_steps``: ``"error"`` raises, ``"last"``
            reuses the last column.

    Attributes:
        rates: parameter, [len(names), num_steps].
        names: the adapted parameters' names, in the order of ``module.named_parameters()``.
        lr: what every rate was at first.

    Raises:
        TypeError: if ``module`` is no module or ``num_steps`` no whole number.
        ValueError: if ``lr`` is not finite or is negative, nothing is left to adapt, a pattern
            matches nothing, or ``module`` holds adapted weights instead of parameters.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> lslr = LSLR(net, num_steps=5, lr=0.1)
        >>> lslr.names, lslr.rates.shape
        (('weight', 'bias'), torch.Size([2, 5]))

    Source:
        Antoniou et al., "How to train your MAML", ICLR 2019, section 4: learning per-layer
        per-step learning rates and gradient directions (LSLR).
    """

    def __init__(
        self,
        module: nn.Module,
        num_steps: int,
        lr: float = 0.1,
        *,
        adapt: Adapt = None,
        learnable: bool = True,
        extra_steps: ExtraSteps = "error",
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"LSLR takes the torch.nn.Module it adapts, got {type(module).__name__}; pass the "
                "model itself, not its parameters"
            )
        self.num_steps = checked_count("num_steps", num_steps)
        self.extra_steps = checked_extra_steps(extra_steps)
        number = isinstance(lr, Real) or (isinstance(lr, Tensor) and not lr.dim())
        if isinstance(lr, bool) or not number or not 0 <= lr < math.inf:
            raise ValueError(
                f"lr must be a finite number of at least 0, got {lr!r}; 0.1 is the paper's for "
                "Omniglot and 0.01 for Mini-ImageNet (training may turn a rate negative later); "
                "for rates that differ write to lslr.rates.data [tensors, num_steps]"
            )
        self.lr = float(lr)
        held = [p for m in module.modules() if isinstance(m, LSLR) for p in m.parameters()]
        self.names = select_parameters(module, adapt, held)
        chosen = dict(module.named_parameters())
        # Tensor identity is how integrations.torchopt pairs rates with an unnamed tuple of
        # parameters. In a list, where nn.Module does not register them; held by reference, so that
        # copying or pickling model and table together keeps the pairs.
        self._sources = [chosen[name] for name in self.names]
        like = chosen[self.names[0]]
        double = like.dtype in (torch.float64, torch.complex128)
        dtype = torch.float64 if double else torch.float32
        rates = torch.full((len(self.names), self.num_steps), self.lr, dtype=dtype)
        self.rates = nn.Parameter(rates.to(like.device), requires_grad=learnable)
        self._second_order_checked = False

    @overload
    def update(
        self, params: Mapping[str, Tensor], grads: Grads, step: int
    ) -> dict[str, Tensor]: ...
    @overload
    def update(self, params: Sequence[Tensor], grads: Grads, step: int) -> list[Tensor]: ...
    def update(
        self, params: Mapping[str, Tensor] | Sequence[Tensor], grads: Grads, step: int
    ) -> dict[str, Tensor] | list[Tensor]:
        """Returns the parameters after one inner step; changes nothing.

        Args:
            params: the parameters by name, at least the adapted ones, of any shapes; or those of
                ``names``, in their order, as ``torch.autograd.grad`` and functional nets have them.
            grads: their gradients by name or in that order; None leaves a parameter as it is.
                Ask ``torch.autograd.grad`` for the adapted ones alone (``names``): those of
                per-step layers reach back through all earlier steps, at twice the cost.
            step: the inner step, 0-based.

        Returns:
            All of ``params``, the adapted ones updated: a dict, or a list if that was given.

        Raises:
            KeyError: if an adapted parameter is missing from ``params`` or ``grads``.
            TypeError: if one of these is neither a dict nor a sequence.
            ValueError: if ``step`` is out of range, a sequence has not one tensor for each name, or
                a gradient has another shape than its parameter.
            RuntimeError: if every gradient is None; if the gradients have a graph
                (``create_graph=True``) in which something has no second derivative, looked for in
                the first update alone.

        Example:
            >>> net = torch.nn.Linear(2, 1)
            >>> params = dict(net.named_parameters())
            >>> grads = torch.autograd.grad(net(torch.ones(1, 2)).sum(), params.values())
            >>> sorted(LSLR(net, num_steps=5).update(params, grads, step=0))
            ['bias', 'weight']
        """
        in_order = not isinstance(params, Mapping)
        params, grads = by_name(self.names, params, "params"), by_name(self.names, grads, "grads")
        column = self._column(step)
        present = [i for i, name in enumerate(self.names) if grads[name] is not None]
        names = [self.names[i] for i in present]
        check_reached(self.names, names, step)
        chosen: Any = [grads[name] for name in names]
        check_shapes(names, params, chosen)
        if not self._second_order_checked and any(grad.requires_grad for grad in chosen):
            check_second_derivatives(chosen)
            self._second_order_checked = True  # of the first step; it takes some 100 us
        rates = column if len(names) == len(self.names) else column[present]
        adapted = descend([params[name] for name in names], chosen, rates)
        params.update(zip(names, adapted, strict=True))  # torch 2.6 cannot compile |=
        return [*params.values()] if in_order else params

    def rates_at(self, step: int) -> dict[str, Tensor]:
        """Returns the rates of an inner step by name, each 0-dim.

        Args:
            step: the inner step, 0-based.

        Raises:
            TypeError: if ``step`` is not a whole number.
            ValueError: if ``step`` is out of range.
        """
        return dict(zip(self.names, self._column(step).unbind(), strict=True))

    def _column(self, step: int) -> Tensor:
        step = checked_count("step", step, least=0)
        column = select_row(step, self.num_steps, self.extra_steps, "LSLR")
        return self.rates.select(1, column)

    def parameters_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the adapted parameters of ``module`` by name.

        Args:
            module: the model this table was made for, or one with the same names.

        Raises:
            TypeError: if ``module`` is not a module.
            ValueError: if a name is missing in ``module``, so that the table is another model's, or
                its parameters have been replaced by adapted weights.
        """
        return parameters_named(module, self.names)

    def name_of(self, tensor: Tensor) -> str | None:
        """Returns the name under which this very tensor is adapted, or None."""
        for name, source in zip(self.names, self._sources, strict=True):
            if source is tensor:
                return name
        return None

    def get_extra_state(self) -> dict[str, list[str]]:
        """Returns the names, which travel in the ``state_dict`` beside the rates."""
        return {"names": list(self.names)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """The names are checked before anything is loaded, in ``_load_from_state_dict``."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + "_extra_state"
        names = state_dict[key]["names"] if key in state_dict else list(self.names)
        error_msgs = kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]
        if list(names) != list(self.names):
            gone = [name for name in names if name not in self.names]
            new = [name for name in self.names if name not in names]
            error_msgs.append(
                f"the checkpoint's rates belong to other parameters: only there {listing(gone)}; "
                f"only in this LSLR {listing(new)}"
                + ("; the order differs" if not gone and not new else "")
                + ". Build the LSLR from the model and with the adapt that the checkpoint was made "
                "with; nothing was loaded"
            )
            return
        rates = state_dict.get(prefix + "rates", self.rates)
        if rates.dim() == 2 and rates.shape[1] != self.num_steps:
            error_msgs.append(
                f"the checkpoint's rates have num_steps={rates.shape[1]}, this LSLR has "
                f"num_steps={self.num_steps}; build it with the former (extra_steps='last' lets it "
                "take more steps); nothing was loaded"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the settings for ``repr``."""
        return (
            f"{len(self.names)} tensors, num_steps={self.num_steps}, "
            f"learnable={self.rates.requires_grad}, extra_steps={self.extra_steps!r}"
        )


def checked_lslr(lslr: Any) -> LSLR:
    """Returns ``lslr`` if it is one."""
    if not isinstance(lslr, LSLR):
        raise TypeError(
            f"expected the inner rates, an LSLR, got {type(lslr).__name__}; it takes the place of "
            "an inner optimizer: pass LSLR(model, num_steps, lr) (learnable=False fixes the rates)"
        )
    return lslr
