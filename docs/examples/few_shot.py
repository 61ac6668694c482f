"""Few-shot tasks from handwriting, the network of the papers, and accuracy with its interval.

Every quarter turn of a character is a class of its own, as in the papers. Images are kept as uint8
(ink 255) and become float (ink 1) when a task is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# x_support [T, S, 1, H, W], y_support [T, S], x_target [T, Q, 1, H, W], y_target [T, Q]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]

TURNS = 4
SPLIT_SEED = 0
OMNIGLOT_SPLIT = (1150, 50)  # characters to train on and to validate with; the rest is the test


@dataclass(frozen=True)
class FewShotData:
    """Images by character, uint8 [characters, drawings, H, W], with no character in two parts."""

    name: str
    train: Tensor
    val: Tensor
    test: Tensor


def load(path: str | Path | None = None) -> FewShotData:
    """Loads Omniglot from ``path``, or without one scikit-learn's handwritten digits (8x8).

    Args:
        path: ``omniglot28.npz`` (``images`` uint8 [1623, 20, 28, 28], ink 255), or the folder that
            holds ``images_background`` and ``images_evaluation`` with Omniglot's PNGs.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it holds no character images.
    """
    if path is None:
        return _digits()
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}; give a .npz file or a folder of Omniglot's PNGs"
        )
    images = _from_folder(path) if path.is_dir() else _from_archive(path)
    if images.dim() != 4 or len(images) <= sum(OMNIGLOT_SPLIT):
        raise ValueError(
            f"{path} holds images of shape {tuple(images.shape)}; Omniglot's are "
            f"[1623, 20, 28, 28], and more than {sum(OMNIGLOT_SPLIT)} characters are needed"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [*OMNIGLOT_SPLIT, len(images) - sum(OMNIGLOT_SPLIT)]
    return FewShotData("omniglot", *(images[part] for part in order.split(sizes)))


def _digits() -> FewShotData:
    """The digits 0 to 6 to train on, and 7, 8 and 9, which training never sees in any turn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    by_digit = [digits.images[digits.target == digit] for digit in range(10)]
    fewest = min(len(images) for images in by_digit)
    images = np.stack([images[:fewest] for images in by_digit]) * (255 / 16)
    tensor = torch.from_numpy(images.round().astype(np.uint8))
    return FewShotData("digits", tensor[:7], tensor[7:], tensor[7:])  # nothing is chosen by val


def _from_archive(path: Path) -> Tensor:
    with np.load(path) as archive:
        if "images" not in archive:
            raise ValueError(f"{path} holds {list(archive)}, expected an array named 'images'")
        return torch.from_numpy(archive["images"])


def _from_folder(folder: Path) -> Tensor:
    from PIL import Image

    characters = sorted({drawing.parent for drawing in folder.glob("**/character*/*.png")})
    if not characters:
        raise ValueError(
            f"{folder} holds no Alphabet/characterNN/*.png; unpack Omniglot's images there"
        )
    drawings = [sorted(character.glob("*.png")) for character in characters]
    fewest = min(len(names) for names in drawings)
    images = np.empty((len(characters), fewest, 28, 28), dtype=np.uint8)
    for row, names in zip(images, drawings, strict=True):
        for image, name in zip(row, names[:fewest], strict=True):
            with Image.open(name) as drawing:  # 105x105, black ink on white
                image[:] = 255 - np.asarray(
                    drawing.convert("L").resize((28, 28), Image.Resampling.BOX)
                )
    return torch.from_numpy(images)


class TaskSampler:
    """Draws batches of tasks, with random numbers of its own.

    Args:
        images: uint8 [characters, drawings, H, W].
        ways: classes in a task.
        shots: support images of each class.
        targets: target images of each class.
        tasks: T, tasks in a batch.
        seed: two samplers with the same seed draw the same tasks.

    Raises:
        ValueError: if there are too few classes or drawings.
    """

    def __init__(
        self, images: Tensor, ways: int, shots: int, targets: int, tasks: int, seed: int = 0
    ) -> None:
        self.images, self.ways, self.shots, self.targets = images, ways, shots, targets
        self.tasks = tasks
        characters, drawings = images.shape[:2]
        if ways > characters * TURNS:
            raise ValueError(f"{ways} ways need as many classes, there are {characters * TURNS}")
        if shots + targets > drawings:
            raise ValueError(
                f"{shots} shots and {targets} targets need {shots + targets} drawings of each "
                f"class, there are {drawings}"
            )
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self) -> Batch:
        """Returns the next batch: images with ink 1, labels 0 to ``ways - 1``."""
        characters, drawings = self.images.shape[:2]
        classes = self._choose(self.tasks, characters * TURNS, chosen=self.ways)
        shown = self._choose(self.tasks, self.ways, drawings, chosen=self.shots + self.targets)
        x = self.images[(classes // TURNS).unsqueeze(-1), shown].to(torch.get_default_dtype()) / 255
        for turn in range(1, TURNS):
            turned = classes % TURNS == turn
            x[turned] = torch.rot90(x[turned], turn, (-2, -1))
        y = torch.arange(self.ways).view(1, -1, 1).expand(shown.shape)
        x_support, x_target = x.split([self.shots, self.targets], dim=2)
        y_support, y_target = y.split([self.shots, self.targets], dim=2)
        return (
            x_support.flatten(1, 2).unsqueeze(2),
            y_support.flatten(1),
            x_target.flatten(1, 2).unsqueeze(2),
            y_target.flatten(1),
        )

    def _choose(self, *shape: int, chosen: int) -> Tensor:
        """Draws without replacement among the last of ``shape``."""
        return torch.rand(shape, generator=self.generator).argsort(-1)[..., :chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"])


def conv_net(channels: int, ways: int, filters: int, size: int) -> nn.Sequential:
    """The network of the papers: blocks of convolution, batch norm, ReLU and pooling, and a head.

    Args:
        channels: of the images.
        ways: classes to tell apart.
        filters: channels of every block.
        size: height and width of the images; 28 gives the papers' four blocks, 8 gives three.
    """
    net = nn.Sequential()
    for block in range(1, min(4, int(math.log2(size))) + 1):
        net.add_module(f"conv{block}", nn.Conv2d(channels, filters, 3, padding=1))
        net.add_module(f"norm{block}", nn.BatchNorm2d(filters))
        net.add_module(f"relu{block}", nn.ReLU())
        net.add_module(f"pool{block}", nn.MaxPool2d(2))
        channels, size = filters, size // 2
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(filters * size * size, ways))
    return net


def task_accuracies(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the share of right answers of each task, [T], from [T, Q, ways] and [T, Q]."""
    return (logits.argmax(-1) == y).float().mean(-1)


def mean_and_interval(accuracies: Tensor) -> tuple[float, float]:
    """Returns the mean over tasks and the half-width of its 95 % interval."""
    spread = accuracies.std().item() if len(accuracies) > 1 else math.nan
    return accuracies.mean().item(), 1.96 * spread / math.sqrt(len(accuracies))


def summary(accuracies: Tensor) -> dict[str, float]:
    """Returns what a record keeps of accuracies: their mean, its interval and their number."""
    mean, interval = mean_and_interval(accuracies)
    return {"accuracy": mean, "interval": interval, "tasks": len(accuracies)}
