"""Handwritten characters: scikit-learn's digits, and Omniglot as an archive or a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import image_archives
import image_files

SPLIT_SEED = 0
OMNIGLOT_SPLIT = (1150, 50)  # characters to train on and to validate with; the rest is the test


def digits() -> tuple[Tensor, Tensor]:
    """The digits 0 to 6 to train on, and 7, 8 and 9, which training never sees in any turn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    by_digit = [digits.images[digits.target == digit] for digit in range(10)]
    fewest = min(len(images) for images in by_digit)
    images = np.stack([images[:fewest] for images in by_digit]) * (255 / 16)
    tensor = torch.from_numpy(images.round().astype(np.uint8))
    return tensor[:7], tensor[7:]


def omniglot(path: Path) -> tuple[Tensor, ...] | None:
    """Returns Omniglot's characters to train on, validate with and test on.

    Args:
        path: ``omniglot28.npz`` (``images`` uint8 [1623, 20, 28, 28], ink 255), or the folder that
            holds ``images_background`` and ``images_evaluation`` with the PNGs.

    Returns:
        uint8 [characters, drawings, 28, 28] three times; None if something else is at ``path``.
    """
    if path.is_dir():
        images = None if image_files.parts_in(path) else _from_folder(path)
    else:
        images = _from_archive(path) if path.suffix == ".npz" and path.exists() else None
    if images is None:
        return None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [*OMNIGLOT_SPLIT, len(images) - sum(OMNIGLOT_SPLIT)]
    return tuple(images[part] for part in order.split(sizes))


def _from_archive(path: Path) -> Tensor | None:
    shape, _ = image_archives.shape_of_images(path)
    if len(shape) != 4 or shape[0] <= sum(OMNIGLOT_SPLIT):
        return None
    with np.load(path) as archive:
        return None if "split" in archive else torch.from_numpy(archive["images"])


def _from_folder(folder: Path) -> Tensor | None:
    from PIL import Image

    characters = sorted({drawing.parent for drawing in folder.glob("**/character*/*.png")})
    if not characters:
        return None
    if len(characters) <= sum(OMNIGLOT_SPLIT):
        if all(character.parent == folder for character in characters):
            return None  # classes that happen to be called so
        raise ValueError(
            f"{folder} holds {len(characters)} folders named character...; Omniglot has 1623, and "
            f"more than {sum(OMNIGLOT_SPLIT)} are needed"
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
