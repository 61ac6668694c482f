"""Few-shot tasks from images, the network of the papers, and accuracy with its interval.

Every quarter turn of a handwritten character is a class of its own, as in the papers; other images
stay as they are. Images are kept as uint8 (ink 255) and become float (ink 1) when a task is drawn.
"""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import handwriting
from image_data import read_images
from image_store import PARTS, Images
from task_sampler import Batch, TaskSampler

__all__ = [
    "Batch",
    "FewShotData",
    "TaskSampler",
    "conv_net",
    "load",
    "mean_and_interval",
    "summary",
    "task_accuracies",
]


@dataclass(frozen=True)
class FewShotData:
    """Images by class, with no class in two parts.

    Attributes:
        name: ``"digits"``, ``"omniglot"`` or, for all others, ``"images"``.
        train: handwriting as uint8 [characters, drawings, H, W], other images as Images.
        val: the same.
        test: the same.
        title: what the reports call it.
        source: what another process gives :func:`load` for the same data.
        notes: what a reader of the results should know, in lines.
    """

    name: str
    train: Tensor | Images
    val: Tensor | Images
    test: Tensor | Images
    title: str
    source: str | Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        if isinstance(self.train, Images):
            return tuple(self.train.pixels.shape[1:3])
        return tuple(self.train.shape[-2:])

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return 3 if isinstance(self.train, Images) and self.train.pixels.dim() == 4 else 1

    def summary(self) -> str:
        """Returns in a line or a few what was read."""
        parts = []
        for part, images in zip(PARTS, (self.train, self.val, self.test), strict=True):
            if isinstance(images, Images):
                parts.append(f"{part} {len(images.names)} classes ({sum(images.counts):,} images)")
            else:
                characters, drawings = images.shape[:2]
                parts.append(f"{part} {characters:,} characters ({characters * drawings:,} images)")
        first = f"read {self.title}: {', '.join(parts)}"
        return "\n".join([first, *self.notes])

    def ink(self) -> int:
        """Returns the sum of all values of the training images, which tells data sets apart."""
        if isinstance(self.train, Tensor):
            return int(self.train.sum())
        pixels = self.train.pixels.numpy()  # whose sum, other than torch's, makes no copy of int64
        places = zip(self.train.starts, self.train.counts, strict=True)
        return sum(int(pixels[start : start + n].sum(dtype=np.int64)) for start, n in places)


def load(
    path: str | Path | None = None, size: int | None = None, cache: bool = False
) -> FewShotData:
    """Loads images from ``path``, or without one scikit-learn's handwritten digits (8x8).

    Args:
        path: ``omniglot28.npz`` (``images`` uint8 [1623, 20, 28, 28], ink 255), the folder that
            holds ``images_background`` and ``images_evaluation`` with Omniglot's PNGs, or images
            of your own as :func:`image_data.read_images` takes them.
        size: height and width to bring images of your own to.
        cache: whether to keep what was decoded, beside the data.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        OSError: if something there cannot be read.
        ValueError: if it holds no images, or ``size`` is given for handwriting.
    """
    if path is None:
        _refuse_size(size, "the digits are 8x8")
        train, test = handwriting.digits()
        return FewShotData("digits", train, test, test, "digits, 8x8, grey")  # val chooses nothing
    path = Path(path).expanduser()
    if not (path.exists() or glob.glob(str(path))):
        raise FileNotFoundError(
            f"no data at {path}; give a folder of images, .npz files or Omniglot's PNGs"
        )
    characters = handwriting.omniglot(path)
    if characters is not None:
        _refuse_size(size, "Omniglot is read at the size it has here")
        height, width = characters[0].shape[-2:]
        title = f"Omniglot, {height}x{width}, grey"
        return FewShotData("omniglot", *characters, title=title, source=path)
    stored = read_images(path, size, cache)
    data = FewShotData("images", *stored.parts, "", stored.file, stored.notes)
    height, width = data.size
    colour = "grey" if data.channels == 1 else "colour"
    return replace(data, title=f"{stored.name}, {height}x{width}, {colour}")


def _refuse_size(size: int | None, why: str) -> None:
    if size is not None:
        raise ValueError(f"--size {size} is for images of your own; {why}")


def conv_net(channels: int, ways: int, filters: int, size: int | tuple[int, int]) -> nn.Sequential:
    """The network of the papers: blocks of convolution, batch norm, ReLU and pooling, and a head.

    Args:
        channels: of the images.
        ways: classes to tell apart.
        filters: channels of every block.
        size: height and width of the images, or one number for both; 28, 32 and 84 give the
            papers' four blocks, 8 gives three.
    """
    height, width = (size, size) if isinstance(size, int) else size
    net = nn.Sequential()
    for block in range(1, min(4, int(math.log2(min(height, width)))) + 1):
        net.add_module(f"conv{block}", nn.Conv2d(channels, filters, 3, padding=1))
        net.add_module(f"norm{block}", nn.BatchNorm2d(filters))
        net.add_module(f"relu{block}", nn.ReLU())
        net.add_module(f"pool{block}", nn.MaxPool2d(2))
        channels, height, width = filters, height // 2, width // 2
    net.add_module("flatten", nn.Flatten())
    net.add_module("head", nn.Linear(filters * height * width, ways))
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
