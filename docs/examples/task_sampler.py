"""Batches of few-shot tasks, drawn from the images of one part of the data.

Every quarter turn of a handwritten character is a class of its own, as in the papers; other images
stay as they are. Images are kept as uint8 (ink 255) and become float (ink 1) when a task is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from image_store import Images

# x_support [T, S, C, H, W], y_support [T, S], x_target [T, Q, C, H, W], y_target [T, Q]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]

TURNS = 4


class TaskSampler:
    """Draws batches of tasks, with random numbers of its own.

    Args:
        images: handwriting as uint8 [characters, drawings, H, W], each quarter turn of which is a
            class; or other images.
        ways: classes in a task.
        shots: support images of each class.
        targets: target images of each class.
        tasks: T, tasks in a batch.
        seed: two samplers with the same seed draw the same tasks.
        flip: whether every second image, by chance, is mirrored; not for handwriting.

    Raises:
        ValueError: if there are too few classes or images.
    """

    def __init__(
        self,
        images: Tensor | Images,
        ways: int,
        shots: int,
        targets: int,
        tasks: int,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        self.ways, self.shots, self.targets, self.tasks = ways, shots, targets, tasks
        self.flip = flip
        if isinstance(images, Tensor):
            if flip:
                raise ValueError("--flip is for photographs; characters come in quarter turns")
            characters, drawings = images.shape[:2]
            self.turns, self.pixels = TURNS, images.flatten(0, 1)
            self.counts = torch.full((characters,), drawings)
            self.starts = torch.arange(characters) * drawings
        else:
            self.turns, self.pixels = 1, images.pixels
            self.counts, self.starts = torch.tensor(images.counts), torch.tensor(images.starts)
        self._check(images)
        self.most = int(self.counts.max())
        self.uneven = self.most > int(self.counts.min())
        self.generator = torch.Generator().manual_seed(seed)

    def _check(self, images: Tensor | Images) -> None:
        needed, there = self.shots + self.targets, len(self.counts) * self.turns
        enough = needed <= self.counts.min()
        if isinstance(images, Tensor):
            if self.ways > there:
                raise ValueError(f"{self.ways} ways need as many classes, there are {there}")
            if not enough:
                raise ValueError(
                    f"{self.shots} shots and {self.targets} targets need {needed} drawings of each "
                    f"class, there are {images.shape[1]}"
                )
        elif self.ways > there:
            raise ValueError(
                f"{self.ways} ways need as many classes, there are {there} in {images.part}: "
                f"{_named(images, max(images.counts))}"
            )
        elif not enough:
            raise ValueError(
                f"{self.shots} shots and {self.targets} targets need {needed} images of each class "
                f"in {images.part}: {_named(images, needed - 1)}"
            )

    def sample(self) -> Batch:
        """Returns the next batch: images with ink 1, labels 0 to ``ways - 1``."""
        classes = self._choose(self.tasks, len(self.counts) * self.turns, chosen=self.ways)
        kinds = classes // self.turns
        shown = self._choose_images(kinds)
        x = self.pixels[self.starts[kinds].unsqueeze(-1) + shown]  # [T, ways, n, H, W] or [..., 3]
        x = x.unsqueeze(3) if x.dim() == 5 else x.movedim(-1, 3).contiguous()
        x = x.to(torch.get_default_dtype()) / 255
        for turn in range(1, self.turns):
            turned = classes % self.turns == turn
            x[turned] = torch.rot90(x[turned], turn, (-2, -1))
        if self.flip:
            flipped = torch.rand(shown.shape, generator=self.generator) < 0.5
            x[flipped] = x[flipped].flip(-1)
        y = torch.arange(self.ways).view(1, -1, 1).expand(shown.shape)
        x_support, x_target = x.split([self.shots, self.targets], dim=2)
        y_support, y_target = y.split([self.shots, self.targets], dim=2)
        return (
            x_support.flatten(1, 2),
            y_support.flatten(1),
            x_target.flatten(1, 2),
            y_target.flatten(1),
        )

    def _choose_images(self, kinds: Tensor) -> Tensor:
        """Draws images of each class, [T, ways, shots + targets]."""
        drawn = torch.rand((*kinds.shape, self.most), generator=self.generator)
        if self.uneven:  # places behind a class's last image come last
            drawn[torch.arange(self.most) >= self.counts[kinds].unsqueeze(-1)] = 2.0
        return drawn.argsort(-1)[..., : self.shots + self.targets]

    def _choose(self, *shape: int, chosen: int) -> Tensor:
        """Draws without replacement among the last of ``shape``."""
        return torch.rand(shape, generator=self.generator).argsort(-1)[..., :chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])


def _named(images: Images, most: int) -> str:
    """Returns which classes have how many images, of those with ``most`` at most."""
    pairs = zip(images.names, images.counts, strict=True)
    small = [f"{name} has {count}" for name, count in pairs if count <= most]
    return ", ".join(small[:10]) + (f" and {len(small) - 10} more classes" if small[10:] else "")
