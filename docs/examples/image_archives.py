"""Images in ``.npz`` files: uint8 [classes, n, H, W], or [classes, n, H, W, 3] in colour."""

from __future__ import annotations

import glob
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from image_files import check_apart
from image_store import PARTS, Source


@dataclass(frozen=True)
class Row:
    """One class: a row of the array ``images`` of ``file``; ``part`` None is still to be split."""

    part: str | None
    name: str
    file: Path
    number: int


def find_archives(path: Path) -> list[Path]:
    """Returns the files that a ``.npz`` path, a folder of such files or a pattern stands for."""
    if path.suffix == ".npz" and path.exists():
        return [path]
    if path.is_dir():
        return sorted(path.glob("*.npz"))
    return sorted(Path(name) for name in glob.glob(str(path)) if name.endswith(".npz"))


def part_in(file: Path) -> str | None:
    """Returns the part that a file is named by: ``cifar_fs_train_a.npz`` is of ``train``."""
    words = [word for word in re.split("[^a-z]+", file.stem.lower()) if word in PARTS]
    return words[0] if len(words) == 1 else None


def source_of(files: list[Path], size: int | None) -> Source:
    """Looks at the head of each array, then returns the images to be read file by file.

    Args:
        files: one file, with an array ``split`` or to be split here; or several named by part.
        size: height and width to bring the images to; without it all must be of one size.

    Raises:
        ValueError: if an array is missing or has another shape or kind, or parts are.
    """
    notes: list[str] = []
    if len(files) == 1:
        name, rows = files[0].stem, _rows_of_one(files[0])
    else:
        name, files = _named_alike(files, notes)
        rows = [row for file in files for row in _rows(file, [part_in(file)] * _shape(file)[0])]
    check_apart([(row.part, row.name) for row in rows])
    shapes = {_shape(file)[2:]: file for file in files}
    if len({shape[2:] for shape in shapes}) > 1:
        raise ValueError(
            f"the images of {name} are grey in one file and in colour in another "
            f"({', '.join(f'{shape} in {file}' for shape, file in shapes.items())}); bring the "
            "arrays to one kind"
        )
    if size is None and len(shapes) > 1:
        raise ValueError(
            f"the images of {name} are of several sizes "
            f"({', '.join(f'{shape[:2]} in {file}' for shape, file in shapes.items())}); --size "
            "brings all to one, as --size 84"
        )
    shape = next(iter(shapes))
    shape = (size, size, *shape[2:]) if size else shape
    return Source(name, shape, _read(rows, shape), notes)


def _named_alike(files: list[Path], notes: list[str]) -> tuple[str, list[Path]]:
    """Returns the files named by part, and what their names have in common before it."""
    by_name: dict[str, list[Path]] = {}
    for file in files:
        if part_in(file):
            name = re.split("train|val|test", file.stem.lower())[0].strip("_-. ")
            by_name.setdefault(name, []).append(file)
    others = [file.name for file in files if not part_in(file)]
    if len(by_name) != 1:
        raise ValueError(
            f"{files[0].parent} has {len(files)} .npz files of which {len(by_name)} sets are named "
            f"by part ({', '.join(sorted(f'{name}*' for name in by_name)) or 'none'}); give one "
            "file, or a pattern for files with train, val and test in their names"
        )
    if others:
        notes.append(f"left out, as no part is in their names: {', '.join(others)}")
    ((name, ours),) = by_name.items()
    _all_there({part_in(file) for file in ours}, ours[0].parent)
    return name or files[0].resolve().parent.name, ours


def _all_there(there: set[str | None], where: Path) -> None:
    missing = [part for part in PARTS if part not in there]
    if missing:
        raise ValueError(f"{where} has nothing for {', '.join(missing)}; give train, val and test")


def _rows_of_one(file: Path) -> list[Row]:
    """Its classes, each with the part that the array ``split`` says, or none."""
    classes = _shape(file)[0]
    split = _array(file, "split")
    if split is None:
        if part_in(file):
            raise ValueError(
                f"{file} is named by part, {part_in(file)}; give its folder, or a pattern, so "
                "that train, val and test are read together"
            )
        return _rows(file, [None] * classes)
    parts = split.tolist()
    if len(parts) != classes or not set(parts) <= set(PARTS):
        raise ValueError(
            f"'split' in {file} has {len(parts)} values, among them {sorted(set(parts))[:5]}; "
            f"train, val or test is needed for each of {classes} classes"
        )
    _all_there(set(parts), file)
    return _rows(file, parts)


def _rows(file: Path, parts: Sequence[str | None]) -> list[Row]:
    array = _array(file, "classes")
    names = (
        [f"{file.stem}[{row}]" for row in range(len(parts))] if array is None else array.tolist()
    )
    if len(names) != len(parts):
        raise ValueError(
            f"'classes' in {file} has {len(names)} names for {len(parts)} classes of 'images'; a "
            "name for each is needed, or no array of that name"
        )
    return [Row(part, str(names[row]), file, row) for row, part in enumerate(parts)]


def _array(file: Path, name: str) -> np.ndarray | None:
    """Returns an array of the archive, None if it has no such array."""
    try:
        with file.open("rb") as stream, np.load(stream) as archive:
            return archive.get(name)
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        raise ValueError(
            f"{name!r} in {file} is broken: {error}; write or fetch it again"
        ) from error


def shape_of_images(file: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and kind of the array ``images`` without reading it.

    Raises:
        ValueError: if there is no such array, or the file cannot be read.
    """
    try:
        with file.open("rb") as stream, np.load(stream) as archive:
            if "images" not in archive:
                raise KeyError(f"it holds {list(archive)}, expected an array named 'images'")
        with zipfile.ZipFile(file) as archive, archive.open("images.npy") as array:
            one = np.lib.format.read_magic(array) == (1, 0)
            header = np.lib.format
            read = header.read_array_header_1_0 if one else header.read_array_header_2_0
            shape, _, kind = read(array)
    except KeyError as error:
        raise ValueError(f"{file} cannot be used: {error.args[0]}") from error
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own
        raise ValueError(
            f"{file} cannot be read as an archive of arrays ({error}); numpy.savez writes one"
        ) from error
    return shape, kind


def _shape(file: Path) -> tuple[int, ...]:
    shape, kind = shape_of_images(file)
    right = len(shape) == 4 or (len(shape) == 5 and shape[4] == 3)
    if kind != np.uint8 or not right or 0 in shape:
        raise ValueError(
            f"'images' in {file} is {kind} {list(shape)}; uint8 [classes, n, H, W] is needed, or "
            "[classes, n, H, W, 3] in colour"
        )
    return shape


def _read(
    rows: list[Row], shape: tuple[int, ...]
) -> Iterator[tuple[str | None, str, Iterator[np.ndarray]]]:
    for file, ours in groupby(rows, lambda row: row.file):
        images = _array(file, "images")
        for row in ours:
            yield row.part, row.name, (_fit(image, shape) for image in images[row.number])
        del images  # before the next file is read


def _fit(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if image.shape == shape:
        return image
    resized = Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)
