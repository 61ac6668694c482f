"""Decoded images as uint8 in one file, which every process maps into memory instead of copying it.

Beside ``name.npy`` lies ``name.json``, which says what the file holds; both together are data, too:
``make demo DATA=name.npy``.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

PARTS = ("train", "val", "test")
SHARES = (0.64, 0.16, 0.20)  # those of Mini-ImageNet's and CIFAR-FS's 64, 16 and 20 classes
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Some classes of a file of images; different classes may have different numbers of them.

    Attributes:
        file: ``.npy`` with uint8 [N, H, W] or [N, H, W, 3], one class after the other.
        part: ``train``, ``val`` or ``test``.
        names: of the classes.
        starts: the place in the file of each class's first image.
        counts: images of each class.
    """

    file: Path
    part: str
    names: tuple[str, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @cached_property
    def pixels(self) -> Tensor:
        """All images of the file, read from it when they are looked at."""
        # Of the modes, "c" alone gives torch an array that it takes without a warning.
        return torch.from_numpy(np.load(self.file, mmap_mode="c"))

    def __getstate__(self) -> dict[str, Any]:
        """Another process is sent the path, and maps the file itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Stored:
    """What a file of images holds.

    Attributes:
        file: the ``.npy`` file.
        name: of the data.
        parts: train, val and test.
        notes: what a reader of the results should know, in lines.
    """

    file: Path
    name: str
    parts: tuple[Images, ...]
    notes: tuple[str, ...]


@dataclass
class Source:
    """Images before they are read.

    Attributes:
        name: of the data.
        shape: of each image: H, W or H, W, 3.
        classes: part (None: to be split here), name and images of each class.
        notes: lines for the reader, complete once the images have been read.
    """

    name: str
    shape: tuple[int, ...]
    classes: Iterable[tuple[str | None, str, Iterable[np.ndarray]]]
    notes: list[str]


def temporary_file() -> Path:
    """Returns a path in a new folder, which is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="few-shot-images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "images.npy"


def remove_temporary(file: str | Path | None) -> None:
    """Removes what :func:`temporary_file` made, for a program that ends without ``atexit``."""
    if file and Path(file).parent.name.startswith("few-shot-images-"):
        shutil.rmtree(Path(file).parent, ignore_errors=True)


def write(source: Source, file: Path, about: dict[str, Any]) -> Stored:
    """Reads all images once and writes each to ``file`` before the next is read.

    Args:
        source: the images.
        file: where to; the description goes beside it.
        about: added to the description.

    Raises:
        OSError: if it cannot be written.
        ValueError: if a part has no class with images.
    """
    aside, description = file.with_name(f"{file.name}.{os.getpid()}.tmp"), file.with_suffix(".json")
    try:
        with aside.open("wb") as stream:
            found = _write_images(source, stream)
        empty = [f"{part}/{name}" if part else name for part, name, count in found if not count]
        if empty:
            source.notes.append(f"skipped {listed(empty, 'class', 'classes')}: no readable image")
        classes = _split([entry for entry in found if entry[2]], source)
        description.unlink(missing_ok=True)  # a kill leaves no description of another file
        aside.replace(file)
    except OSError as error:  # of writing: one of reading is noted, and the file skipped
        raise OSError(
            f"{file} cannot be written: {error}; TMPDIR names another place for temporary files, "
            "and --size makes them smaller"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    about = {**about, "name": source.name, "classes": classes, "notes": source.notes}
    aside.write_text(json.dumps(about))
    aside.replace(description)
    return read(file)


def _write_images(source: Source, stream: BinaryIO) -> list[tuple[str | None, str, int]]:
    stream.write(_header((0, *source.shape)))
    found = []
    for part, name, images in source.classes:
        count = 0
        for image in images:
            stream.write(image.tobytes())
            count += 1
        found.append((part, name, count))
    stream.seek(0)
    stream.write(_header((sum(count for *_, count in found), *source.shape)))
    return found


def _header(shape: tuple[int, ...]) -> bytes:
    """That of a ``.npy`` file, as long for any number of images: the number is known last."""
    words = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words.encode()


def _split(
    found: list[tuple[str | None, str, int]], source: Source
) -> list[tuple[str | None, str, int]]:
    """Gives each class its part, if it has none, and makes sure that no part is empty."""
    if any(part is None for part, *_ in found):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SPLIT_SEED))
        ends = np.rint(np.cumsum(SHARES) * len(found))
        for place, row in enumerate(order.tolist()):
            part = PARTS[int(np.searchsorted(ends, place, side="right"))]
            found[row] = (part, *found[row][1:])
        shares = " / ".join(f"{100 * share:.0f}" for share in SHARES)
        source.notes.append(
            f"the classes are split here, by seed {SPLIT_SEED}: {shares} % to train, val and test"
        )
    for part in PARTS:
        if not any(entry[0] == part for entry in found):
            raise ValueError(
                f"{source.name} has no class with images for {part}; it has {len(found)} classes "
                f"in all, and train, val and test need their own ({'; '.join(source.notes)})"
            )
    return found


def read(file: Path) -> Stored:
    """Returns what ``file`` holds; the images themselves stay in it until they are looked at.

    Raises:
        ValueError: if it has no description beside it.
    """
    description = file.with_suffix(".json")
    if not description.exists():
        raise ValueError(
            f"{file} has no {description.name} beside it, which says what it holds; give the "
            "images themselves, and --cache writes both"
        )
    about = json.loads(description.read_text())
    classes = [(part, name, count) for part, name, count in about["classes"]]
    ends = np.cumsum([count for *_, count in classes]).tolist()
    parts = []
    for part in PARTS:
        ours = [row for row, entry in enumerate(classes) if entry[0] == part]
        names = tuple(classes[row][1] for row in ours)
        counts = tuple(classes[row][2] for row in ours)
        starts = tuple(ends[row] - classes[row][2] for row in ours)
        parts.append(Images(file, part, names, starts, counts))
    return Stored(file, about["name"], tuple(parts), tuple(about["notes"]))


def is_fresh(file: Path, about: dict[str, Any]) -> bool:
    """Says whether ``file`` is whole and was made from just what ``about`` describes."""
    description = file.with_suffix(".json")
    if not (file.exists() and description.exists()):
        return False
    try:
        there = json.loads(description.read_text())
    except ValueError:  # of something else
        return False
    return all(there.get(key) == value for key, value in about.items())


def listed(names: Sequence[str], one: str, many: str) -> str:
    """Returns "3 files (a, b, c)", with ten of the names at most."""
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} {one if len(names) == 1 else many} ({', '.join(names[:10])}{rest})"
