"""What the schedules of this package share: they count epochs as torch's schedulers do."""

from __future__ import annotations

from typing import Any

from mamlpp_ext.checks import checked_count


def epochs_of_run(run_epochs: int, share: float) -> int:
    """Returns a share of a run in epochs: at least 1, but 0 for a share of 0.

    Raises:
        TypeError: if ``run_epochs`` is not a whole number.
        ValueError: if it is below 1, or ``share`` is not between 0 and 1.
    """
    run_epochs = checked_count("run_epochs", run_epochs)
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not 0 <= share <= 1:
        raise ValueError(
            f"share must be a number from 0 to 1, got {share!r}; 0.1 is a tenth of the run's "
            f"{run_epochs} epochs"
        )
    return max(1, round(share * run_epochs)) if share else 0


class EpochSchedule:
    """A position in epochs that advances by :meth:`step` and travels in a ``state_dict``.

    Attributes:
        last_epoch: the present epoch, 0-based, 0 at first.
    """

    def __init__(self) -> None:
        self.last_epoch = 0

    def step(self) -> None:
        """Ends an epoch; call it once an epoch, not once an iteration."""
        self.last_epoch += 1

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.state_dict().items())
        return f"{type(self).__name__}({settings})"

    def state_dict(self) -> dict[str, int]:
        """Returns the settings and ``last_epoch``, all whole numbers."""
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over settings and epoch of another schedule of this class.

        Args:
            state_dict: what its ``state_dict()`` returned.

        Raises:
            TypeError: if an entry is not a whole number.
            ValueError: if entries are missing, unknown or negative, or ``num_steps`` differs. The
                state then stays as it was.
        """
        name, own = type(self).__name__, self.state_dict()
        if set(state_dict) != set(own):
            raise ValueError(
                f"{name} expects a state dict with {sorted(own)}, got {sorted(state_dict)}; load "
                f"one that {name}.state_dict() returned"
            )
        values = {key: checked_count(key, value, least=0) for key, value in state_dict.items()}
        if values.get("num_steps") != own.get("num_steps"):
            raise ValueError(
                f"this {name} has num_steps={own['num_steps']}, the state dict has "
                f"num_steps={values['num_steps']}; build it with the latter"
            )
        self.__dict__.update(values)
