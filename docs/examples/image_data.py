"""Few-shot data of the user's own: folders of images, archives of arrays, and what came of them."""

from __future__ import annotations

import os
from pathlib import Path

import image_archives
import image_files
from image_store import Source, Stored, is_fresh, read, temporary_file, write

SMALLEST = 8  # three blocks of pooling


def read_images(path: Path, size: int | None = None, cache: bool = False) -> Stored:
    """Reads images once into a file that every process can map.

    Args:
        path: a folder with ``train/``, ``val/`` and ``test/``, each with a folder of images for
            each class; a folder of such class folders, to be split here; ``.npz`` files (see
            :mod:`image_archives`), by their folder or a pattern if there are several; or a
            ``.npy`` file that ``cache`` has written.
        size: height and width to bring the images to, stretched if they are not square.
        cache: whether the file is kept, beside the data; a temporary one otherwise.

    Raises:
        OSError: if something cannot be read or written.
        ValueError: if these are no such images, or too few.
    """
    if path.suffix == ".npy":
        return _decoded(path, size)
    archives = image_archives.find_archives(path)
    classes = image_files.find_classes(path) if path.is_dir() else []
    if archives and not any(entry.files for entry in classes):
        source = image_archives.source_of(archives, size)
        if cache:
            source.notes.append("--cache is for folders of images; an archive is read at once")
        return _written(source, temporary_file(), {})
    if not classes:
        raise ValueError(
            f"{path} holds no folders of images (train/, val/ and test/ with a folder for each "
            "class, or class folders alone), no .npz files, and no Alphabet/characterNN/*.png "
            "of Omniglot"
        )
    about = {"size": size, "listing": image_files.listing(classes)}
    if not cache:
        return _written(image_files.source_of(path, classes, size), temporary_file(), about)
    folder = path.resolve()
    file = folder.with_name(f"{folder.name}.decoded{f'-{size}' if size else ''}.npy")
    if is_fresh(file, about):
        return _noting(read(file), f"as decoded before, from {file}")
    if not os.access(file.parent, os.W_OK):  # said now, not after an hour
        raise PermissionError(f"--cache cannot write to {file.parent}; go without it")
    source = image_files.source_of(path, classes, size)
    return _noting(_written(source, file, about), f"kept in {file} for the next time")


def _decoded(path: Path, size: int | None) -> Stored:
    stored = read(path)
    height, width = stored.parts[0].pixels.shape[1:3]
    if size and (size, size) != (height, width):
        raise ValueError(
            f"{path} holds images of {height}x{width}, not {size}x{size}; give the folder that it "
            "was made from"
        )
    return stored


def _written(source: Source, file: Path, about: dict[str, object]) -> Stored:
    if min(source.shape[:2]) < SMALLEST:
        raise ValueError(
            f"the images of {source.name} are of {source.shape[0]}x{source.shape[1]}; at least "
            f"{SMALLEST}x{SMALLEST} is needed for the network's pooling, as --size 28 gives"
        )
    return write(source, file, about)


def _noting(stored: Stored, note: str) -> Stored:
    return Stored(stored.file, stored.name, stored.parts, (*stored.notes, note))
