"""Modules that read the current row of a table, of their own or of modules inside of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mamlpp_ext.checks import ExtraSteps
from mamlpp_ext.norm.made_class import Made
from mamlpp_ext.norm.tables import current_place, spread_over_rows
from mamlpp_ext.steps import InnerStep
from mamlpp_ext.torch_private import held


class Calls(list[None]):
    """The calls of a module that run at present, one inside of the other.

    Held by reference, as :class:`~mamlpp_ext.steps.InnerStep` is: by the module that is called and
    those whose parameters it reads, and by the modules that ``higher`` has patched.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()  # nobody is calling the copy

    def __reduce__(self) -> Any:
        return Calls, ()


class Reader(Made):
    """A module that reads parameters with rows, its own or those of modules inside of it.

    Attributes:
        per_step_calls: its calls that run at present.
    """

    per_step_calls: Calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module; hooks read rows, too, as they would read what the forward reads."""
        return self._call(super().__call__, *args, **kwargs)

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        self.per_step_calls.append(None)
        try:
            return forward(*args, **kwargs)
        finally:
            self.per_step_calls.pop()


class Holder(Reader):
    """A module whose forward reads a row of some of its parameters, the tables.

    From anywhere else ``layer.weight`` is the table [num_steps, ...], which ``parameters()``,
    ``state_dict()`` and all that works by these have. The row is selected when it is read: that is
    right however the table came there (``functional_call``, ``vmap``, ``higher``, ``torchopt``),
    and for calls inside of calls.

    Attributes:
        inner_step: the counter of its model.
        num_steps: how many rows there are.
        extra_steps: what happens at steps beyond.
        per_step_names: of the parameters that are tables.
        per_step_readers: the calls of all modules that read them.
    """

    _prefix = "PerStep"
    inner_step: InnerStep
    num_steps: int
    extra_steps: ExtraSteps
    per_step_names: tuple[str, ...]
    per_step_readers: tuple[Calls, ...]

    def _call(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        own = held(self, "parameters")
        gone = [name for name in self.per_step_names if name not in own]
        if gone:
            raise RuntimeError(
                f"{gone} of {type(self).__name__} had a row for every inner step and are no "
                "parameters of it any more: a parametrization, pruning or DataParallel has put "
                "something else in their place; apply it before the conversion, and use "
                "DistributedDataParallel"
            )
        return super()._call(forward, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns what the module holds, of a table the row if it is read by a forward."""
        value = super().__getattr__(name)
        about = vars(self)
        if name not in about.get("per_step_names", ()) or not isinstance(value, Tensor):
            return value
        if not any(self.per_step_readers) and not self.inner_step.called_in_backward:
            return value
        row = value.select(0, current_place(self))
        # Torch's kernels of norms (2.13) took channels that are not contiguous for such that are.
        return row.contiguous() if row.dim() == 1 else row

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = held(self, "parameters")
        spread_over_rows(
            state_dict, prefix, [(name, own.get(name)) for name in self.per_step_names]
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the settings for ``repr``: those of the layer's own class, and the rows."""
        rows = f"num_steps={self.num_steps}, extra_steps={self.extra_steps!r}, per step: "
        names = rows + ", ".join(self.per_step_names)
        own = super().extra_repr()
        return "\n".join([own, names]) if "\n" in own else ", ".join(filter(None, [own, names]))
