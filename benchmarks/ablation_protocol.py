"""What the ablation compares, and what is alike in all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from learners import PARTS

TUNED = "MAML-tuned"  # plain MAML at the meta rate that suits it: Protocol.tuned_meta_lr
ROWS: dict[str, tuple[str, ...]] = {
    "MAML": (),
    TUNED: (),
    **{f"+{part}": (part,) for part in PARTS},
    "MAML++": PARTS,
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Protocol:
    """What is alike in every row."""

    backend: str = _setting("torchopt", "library underneath")
    ways: int = _setting(20, "classes in a task")
    shots: int = _setting(1, "support images of a class")
    targets: int = _setting(5, "target images of a class")
    steps: int = _setting(5, "inner steps")
    filters: int = _setting(32, "channels of each convolution")
    tasks: int = _setting(2, "tasks in a meta-batch")
    inner_lr: float = _setting(0.1, "inner rate to start from")
    meta_lr: float = _setting(3e-3, "meta rate to start from")
    tuned_meta_lr: float = _setting(1e-3, f"meta rate of the row {TUNED}")
    final_meta_lr: float = _setting(1e-5, "meta rate at the end of cosine annealing")
    epochs: int = _setting(100, "epochs, the unit of the schedules")
    iterations: int = _setting(5, "meta-iterations of an epoch")
    minutes: float | None = _setting(None, "training time in place of the iterations")
    multi_step_loss: int = _setting(10, "epochs of multi-step loss, where it is on")
    first_order: int = _setting(5, "first-order epochs, where derivative order is annealed")
    val_every: int = _setting(20, "epochs between validations")
    val_tasks: int = _setting(30, "tasks of a validation")
    test_tasks: int = _setting(600, "tasks of the test")
    eval_targets: int = _setting(5, "target images of a class in validation and test")

    def rows(self) -> list[str]:
        """Returns the rows that differ: a meta rate that suits MAML needs no row of its own."""
        return [row for row in ROWS if row != TUNED or self.tuned_meta_lr != self.meta_lr]

    def meta_lr_of(self, row: str) -> float:
        """Returns the meta rate that a row starts from."""
        return self.tuned_meta_lr if row == TUNED else self.meta_lr


PRESETS = {
    # Chosen on the validation characters: the meta rate for the demonstration; the first-order
    # epochs and the tuned meta rate with a seed that the table does not have (see README.md).
    "reduced": Protocol(),
    # The schedule of the paper; targets and tasks are those of the authors' configuration.
    "paper-omniglot-20way-1shot": Protocol(
        filters=64,
        targets=1,
        tasks=8,
        iterations=500,
        meta_lr=1e-3,
        first_order=50,
        eval_targets=1,
        val_tasks=600,
        val_every=1,
    ),
}
