"""Where torch's generators of random numbers stand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Generators:
    """Those of the CPU and of the GPUs that some tensors are on, as they stand now.

    Attributes:
        devices: the GPUs.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        self._states = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    def put_back(self) -> None:
        """Has the same numbers drawn again."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self.devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def were_used(self) -> bool:
        """Returns whether any number has been drawn since."""
        pairs = zip(self._states, self._now(), strict=True)
        return not all(torch.equal(*pair) for pair in pairs)
