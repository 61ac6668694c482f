"""Folders of images, one folder a class: found, decoded and brought to one size by Pillow."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from image_store import PARTS, Source, listed

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}  # the other modes: RGB
ORIENTATION = 0x0112  # of EXIF: phones write down how the camera was held, and turn nothing


@dataclass(frozen=True)
class ClassFolder:
    """A folder with the images of one class; ``part`` is None if it is still to be split."""

    part: str | None
    name: str
    files: tuple[Path, ...]


def find_classes(folder: Path) -> list[ClassFolder]:
    """Returns the classes of ``train/``, ``val/`` and ``test/``, or of ``folder`` itself.

    Raises:
        ValueError: if one of the three is missing, or a class is in two of them.
    """
    there = parts_in(folder)
    if not there:
        return _classes_in(folder, None)
    if len(there) < len(PARTS):
        missing = ", ".join(f"{part}/" for part in PARTS if part not in there)
        raise ValueError(
            f"{folder} has {', '.join(f'{part}/' for part in there)} but no {missing}; give all "
            "three, or a folder with one folder of images a class, which is split here"
        )
    classes = [entry for part in PARTS for entry in _classes_in(folder / part, part)]
    check_apart([(entry.part, entry.name) for entry in classes])
    return classes


def parts_in(folder: Path) -> list[str]:
    """Returns which of ``train/``, ``val/`` and ``test/`` are there, with folders inside.

    One with images inside is a class: CIFAR-100 has trains.
    """
    inner = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    return [part for part, place in inner.items() if not _images_in(place)]


def _images_in(folder: Path) -> tuple[Path, ...]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    return tuple(sorted(file for file in files if not file.name.startswith(".")))


def check_apart(classes: list[tuple[str | None, str]]) -> None:
    """Makes sure that no class is in two parts, nor twice in one.

    Raises:
        ValueError: if one is.
    """
    seen: dict[str, str | None] = {}
    for part, name in classes:
        if name in seen:
            raise ValueError(
                f"class {name!r} is in {seen[name] or 'the data'} and again in {part or 'it'}; a "
                "class belongs to one part alone, as the others are to be of unseen classes"
            )
        seen[name] = part


def _classes_in(folder: Path, part: str | None) -> list[ClassFolder]:
    return [
        ClassFolder(part, inner.name, _images_in(inner))
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and not inner.name.startswith((".", "__MACOSX"))
    ]


def listing(classes: list[ClassFolder]) -> str:
    """Returns what changes as soon as an image is added, removed, renamed or written again."""
    found = hashlib.sha256()
    for entry in classes:
        found.update(repr((entry.part, entry.name)).encode())
        for file in entry.files:
            about = file.stat()
            found.update(repr((file.name, about.st_size, about.st_mtime_ns)).encode())
    return found.hexdigest()


def source_of(folder: Path, classes: list[ClassFolder], size: int | None) -> Source:
    """Looks at the head of every image, then returns them to be decoded one by one.

    Args:
        folder: where they are, for messages.
        classes: from :func:`find_classes`.
        size: height and width to bring them to; without it all must be of one size.

    Raises:
        ValueError: if no image can be read, or they are of several sizes and ``size`` is None.
    """
    unreadable: dict[Path, str] = {}
    modes: dict[str, int] = {}
    sizes: dict[tuple[int, int], Path] = {}
    for file in _progress([file for entry in classes for file in entry.files], "looking at"):
        try:
            with _quietly(), Image.open(file) as image:
                modes[image.mode] = modes.get(image.mode, 0) + 1
                sizes.setdefault(_upright_size(image), file)
        except Exception as error:  # what a broken file raises is up to its decoder
            unreadable[file] = _reason(error)
    if not sizes:
        raise ValueError(_nothing(folder, classes, unreadable))
    if size is None and len(sizes) > 1:
        two = " and ".join(f"{w}x{h} ({file})" for (w, h), file in list(sizes.items())[:2])
        raise ValueError(
            f"{folder} has images of {len(sizes)} sizes, as {two}; --size brings all to one, as "
            "--size 84"
        )
    width, height = (size, size) if size else next(iter(sizes))
    grey = sum(count for mode, count in modes.items() if mode in GREY)
    colour = grey < sum(modes.values())
    notes = []
    if grey and colour:
        notes.append(f"{grey:,} of {sum(modes.values()):,} images are grey; all are read as colour")
    reading = _Reading(folder, (width, height), colour, bool(size), unreadable, notes)
    shape = (height, width, 3) if colour else (height, width)
    return Source(folder.resolve().name, shape, reading.classes(classes), notes)


def _nothing(folder: Path, classes: list[ClassFolder], unreadable: dict[Path, str]) -> str:
    names = listed([entry.name for entry in classes], "folder", "folders")
    files = [f"{file.relative_to(folder)}: {why}" for file, why in unreadable.items()]
    found = f"{listed(files, 'file', 'files')} cannot be read" if files else "no images in them"
    return (
        f"{folder} has {names} but {found}; a folder of images ({', '.join(sorted(SUFFIXES))}) is "
        "needed for each class, or one in each of train/, val/ and test/"
    )


@dataclass
class _Reading:
    """Decodes the images of one folder after the other, and notes what cannot be."""

    folder: Path
    size: tuple[int, int]  # width, height
    colour: bool
    resize: bool
    unreadable: dict[Path, str]
    notes: list[str]

    def classes(
        self, classes: list[ClassFolder]
    ) -> Iterator[tuple[str | None, str, Iterator[np.ndarray]]]:
        for entry in _progress(classes, "reading"):
            yield entry.part, entry.name, self._images(entry)
        if self.unreadable:
            files = [f"{f.relative_to(self.folder)}: {why}" for f, why in self.unreadable.items()]
            self.notes.append(f"skipped {listed(files, 'unreadable file', 'unreadable files')}")

    def _images(self, entry: ClassFolder) -> Iterator[np.ndarray]:
        for file in entry.files:
            if file in self.unreadable:
                continue
            try:
                with _quietly():
                    image = decode(file, self.size, self.colour)
            except Exception as error:  # truncated, or of a kind that is not known here
                self.unreadable[file] = _reason(error)
            else:
                yield image


def decode(file: Path, size: tuple[int, int], colour: bool) -> np.ndarray:
    """Returns an image as uint8, [H, W] or, in colour, [H, W, 3].

    Args:
        file: the image.
        size: width and height to bring it to; the sides are stretched alike or not, as in the
            papers.
        colour: whether the result is; otherwise a grey image is expected.
    """
    with Image.open(file) as opened:
        opened.draft(None, (2 * size[0], 2 * size[1]))  # a large JPEG is decoded at a fraction
        image = ImageOps.exif_transpose(opened) if opened.format in ("JPEG", "MPO") else opened
        image = eight_bits(image).convert("RGB" if colour else "L")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)


def eight_bits(image: Image.Image) -> Image.Image:
    """Returns an image of 8 bits a channel that Pillow converts rightly; transparent is white.

    Raises:
        ValueError: if its numbers have no agreed white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white")
    if image.mode.startswith("I"):  # convert("L") would cut off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels of 32 bits have no agreed white")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:  # convert("RGB") would show what hides in transparent pixels
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image)
        return page.convert("RGB")
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.format in ("JPEG", "MPO") and image.getexif().get(ORIENTATION, 1) >= 5:
        return height, width
    return width, height


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings on odd files, which would end a program that forbids them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _progress(items: list, doing: str) -> Iterator:
    return iter(tqdm(items, desc=f"{doing} images", disable=None, delay=2, leave=False))
