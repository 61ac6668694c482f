"""Folders of images: what is decoded, how it is converted, and what is skipped."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import few_shot
import image_data
import image_files
import image_store

SIDE = 12


def folders(
    root: Path, classes: int = 5, images: int = 3, *, mode: str = "RGB", seed: int = 0
) -> Path:
    """``train/``, ``val/`` and ``test/`` with noise, a class folder each with its own noise."""
    rng = np.random.default_rng(seed)
    for part in ("train", "val", "test"):
        for number in range(classes):
            folder = root / part / f"{part}-{number}"
            folder.mkdir(parents=True)
            for image in range(images):
                noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(noise).convert(mode).save(folder / f"{image}.png")
    return root


def first(data: few_shot.FewShotData, part: str = "train") -> np.ndarray:
    """The first image of the first class."""
    images = getattr(data, part)
    return images.pixels[images.starts[0]].numpy()


def test_what_is_in_the_files_is_in_the_data(tmp_path: Path) -> None:
    data = few_shot.load(folders(tmp_path))
    assert data.name == "images"
    assert (data.size, data.channels) == ((SIDE, SIDE), 3)
    for part in (data.train, data.val, data.test):
        assert part.counts == (3,) * 5
        assert part.names == tuple(f"{part.part}-{number}" for number in range(5))
        for name, start in zip(part.names, part.starts, strict=True):
            for image in range(3):
                with Image.open(tmp_path / part.part / name / f"{image}.png") as file:
                    there = np.asarray(file)
                assert np.array_equal(part.pixels[start + image].numpy(), there)
    assert data.summary().splitlines() == [
        f"read {tmp_path.name}, 12x12, colour: train 5 classes (15 images), val 5 classes (15 "
        "images), test 5 classes (15 images)"
    ]


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    data = few_shot.load(folders(tmp_path, mode="L"))
    assert data.channels == 1
    assert "12x12, grey" in data.summary()
    assert first(data).shape == (SIDE, SIDE)


def test_grey_among_colour_is_read_as_colour_and_said(tmp_path: Path) -> None:
    folders(tmp_path)
    path = tmp_path / "train" / "train-0" / "0.png"
    Image.new("L", (SIDE, SIDE), 77).save(path)
    data = few_shot.load(tmp_path)
    assert data.notes == ("1 of 45 images are grey; all are read as colour",)
    assert (first(data) == 77).all()


GREY_16 = np.array([[0, 1, 128, 257], [32768, 40000, 65280, 65535]], dtype=np.uint16)
RIGHT_8 = np.array([[0, 0, 0, 1], [128, 156, 254, 255]], dtype=np.uint8)  # in 257ths


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_brought_to_8(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(GREY_16).save(tmp_path / f"16.{suffix}")
    found = image_files.decode(tmp_path / f"16.{suffix}", (4, 2), colour=False)
    assert np.array_equal(found, RIGHT_8)
    assert found.dtype == np.uint8


def test_palette_and_transparent_images(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png")
    found = image_files.decode(tmp_path / "palette.png", (2, 1), colour=True)
    assert found.tolist() == [[[10, 20, 30], [200, 100, 50]]]

    palette.save(tmp_path / "hole.png", transparency=0)
    found = image_files.decode(tmp_path / "hole.png", (2, 1), colour=True)
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]

    see_through = Image.new("RGBA", (2, 1))
    see_through.putdata([(9, 9, 9, 0), (10, 20, 30, 255)])
    see_through.save(tmp_path / "rgba.png")
    found = image_files.decode(tmp_path / "rgba.png", (2, 1), colour=True)
    assert found.tolist() == [[[255, 255, 255], [10, 20, 30]]]

    Image.new("LA", (2, 1), (0, 0)).save(tmp_path / "la.png")
    found = image_files.decode(tmp_path / "la.png", (2, 1), colour=False)
    assert found.tolist() == [[255, 255]]


@pytest.mark.parametrize(("suffix", "tolerance"), [("tif", 0), ("jpg", 3)])
def test_cmyk(suffix: str, tolerance: int, tmp_path: Path) -> None:
    print_colours = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # cyan
    print_colours.save(tmp_path / f"cmyk.{suffix}")
    found = image_files.decode(tmp_path / f"cmyk.{suffix}", (8, 8), colour=True).astype(int)
    assert np.abs(found - [0, 255, 255]).max() <= tolerance


def test_bilevel(tmp_path: Path) -> None:
    page = Image.new("1", (2, 1), 1)
    page.putpixel((0, 0), 0)
    page.save(tmp_path / "page.png")
    found = image_files.decode(tmp_path / "page.png", (2, 1), colour=False)
    assert found.tolist() == [[0, 255]]


def test_a_phone_held_upright(tmp_path: Path) -> None:
    photograph = Image.new("L", (16, 8))
    photograph.paste(255, (0, 0, 8, 8))  # white on the left
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6  # to be turned clockwise: white is on top
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            folder = tmp_path / part / f"{part}-{name}"
            folder.mkdir(parents=True)
            photograph.save(folder / "1.jpg", exif=exif, quality=100)
    data = few_shot.load(tmp_path)
    assert data.size == (16, 8)
    assert first(data)[:7].min() > 250
    assert first(data)[9:].max() < 5


def test_resizing(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(20, 10), (40, 40), (33, 50)]):
        Image.new("RGB", (width, height), (10, 20, 30)).save(tmp_path / f"{number}.jpg")
        found = image_files.decode(tmp_path / f"{number}.jpg", (9, 9), colour=True)
        assert found.shape == (9, 9, 3)
        assert np.abs(found.astype(int) - [10, 20, 30]).max() <= 3


def test_mixed_sizes_ask_for_one(tmp_path: Path) -> None:
    folders(tmp_path)
    odd = tmp_path / "val" / "val-1" / "1.png"
    Image.new("RGB", (30, 20)).save(odd)
    with pytest.raises(ValueError, match=r"2 sizes, as 12x12 \(.*\) and 30x20 \(.*--size 84"):
        few_shot.load(tmp_path)
    assert few_shot.load(tmp_path, size=16).size == (16, 16)


def test_unreadable_files_are_named_and_counted(tmp_path: Path) -> None:
    folders(tmp_path, images=4)
    train = tmp_path / "train"
    (train / "train-0" / "0.png").write_text("not an image at all")
    whole = (train / "train-1" / "1.png").read_bytes()
    (train / "train-1" / "1.png").write_bytes(whole[: len(whole) // 2])
    (train / "train-2" / "2.png").write_bytes(b"")
    Image.fromarray(np.zeros((SIDE, SIDE), dtype=np.float32)).save(train / "train-3" / "x.tif")
    Image.fromarray(np.full((SIDE, SIDE), 70_000, dtype=np.int32)).save(train / "train-4" / "y.tif")
    (train / "train-0" / "notes.txt").write_text("no image, and not called so")
    (train / "train-0" / ".hidden.png").write_text("of the system")
    data = few_shot.load(tmp_path)
    assert data.train.counts == (3, 3, 3, 4, 4)
    skipped = next(note for note in data.notes if "unreadable" in note)
    assert skipped.startswith("skipped 5 unreadable files (")
    for path, why in [
        ("train/train-0/0.png", "not an image"),
        ("train/train-1/1.png", ""),
        ("train/train-2/2.png", "not an image"),
        ("train/train-3/x.tif", "floating-point pixels have no agreed white"),
        ("train/train-4/y.tif", "pixels of 32 bits have no agreed white"),
    ]:
        assert f"{path}: {why}" in skipped
    assert not any("notes.txt" in note or "hidden" in note for note in data.notes)


def test_many_unreadable_files_are_not_all_named(tmp_path: Path) -> None:
    folders(tmp_path)
    for number in range(12):
        (tmp_path / "train" / "train-0" / f"broken-{number:02}.png").write_text("")
    (skipped,) = few_shot.load(tmp_path).notes
    assert "skipped 12 unreadable files" in skipped
    assert "broken-09.png: not an image and 2 more)" in skipped


def test_a_class_without_images_is_skipped_and_named(tmp_path: Path) -> None:
    folders(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "val" / "words").mkdir()
    (tmp_path / "val" / "words" / "1.png").write_text("no image")
    data = few_shot.load(tmp_path)
    assert len(data.train.names) == len(data.val.names) == 5
    assert "skipped 2 classes (train/empty, val/words): no readable image" in data.notes


def test_nothing_readable(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / part / part).mkdir(parents=True)
        (tmp_path / part / part / "1.png").write_text("no image")
    message = (
        r"has 3 folders \(train, val, test\) but 3 files \(train/train/1.png: not an image, .*"
    )
    with pytest.raises(ValueError, match=message):
        few_shot.load(tmp_path)


def test_folders_of_folders(tmp_path: Path) -> None:
    folders(tmp_path / "photos")
    with pytest.raises(
        ValueError, match=r"has 1 folder \(photos\) but no images in them; a folder"
    ):
        few_shot.load(tmp_path)


def test_warnings_of_pillow_do_not_end_the_reading(tmp_path: Path) -> None:
    folders(tmp_path)
    before = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = SIDE * SIDE - 1  # it warns of decompression bombs
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert few_shot.load(tmp_path).train.counts == (3,) * 5
        Image.MAX_IMAGE_PIXELS = 10  # it refuses them
        with pytest.raises(ValueError, match="decompression bomb"):
            few_shot.load(tmp_path)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_too_small_for_pooling(tmp_path: Path) -> None:
    folders(tmp_path)
    with pytest.raises(ValueError, match=r"are of 4x4; at least 8x8 is needed"):
        few_shot.load(tmp_path, size=4)


def test_kept_beside_the_data(tmp_path: Path) -> None:
    root = folders(tmp_path / "photos")
    kept = tmp_path / "photos.decoded-16.npy"
    once = few_shot.load(root, size=16, cache=True)
    assert once.notes == (f"kept in {kept} for the next time",)
    assert once.source == kept
    assert np.load(kept).shape == (45, 16, 16, 3)  # any reader of .npy takes it
    written = kept.stat().st_mtime_ns

    again = few_shot.load(root, size=16, cache=True)
    assert again.notes == (f"as decoded before, from {kept}",)
    assert kept.stat().st_mtime_ns == written
    assert (again.train, again.title, again.ink()) == (once.train, once.title, once.ink())
    itself = few_shot.load(kept)  # which is data, too
    assert (itself.train, itself.title) == (once.train, once.title)

    few_shot.load(root, cache=True)
    assert (tmp_path / "photos.decoded.npy").exists()  # another size is another file
    Image.new("RGB", (SIDE, SIDE)).save(root / "train" / "train-0" / "new.png")
    assert few_shot.load(root, size=16, cache=True).train.counts == (4, 3, 3, 3, 3)
    assert kept.stat().st_mtime_ns != written
    (root / "train" / "train-0" / "new.png").unlink()
    assert few_shot.load(root, size=16, cache=True).train.counts == (3,) * 5
    assert not list(tmp_path.glob("*.tmp"))


def test_not_kept_unless_asked(tmp_path: Path) -> None:
    root = folders(tmp_path / "photos")
    data = few_shot.load(root)
    assert tmp_path not in data.source.parents
    assert list(tmp_path.iterdir()) == [root]


def test_a_kept_file_alone_is_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "photos")
    kept = few_shot.load(root, cache=True).source
    with pytest.raises(ValueError, match=r"holds images of 12x12, not 16x16; give the folder"):
        few_shot.load(kept, size=16)
    kept.with_suffix(".json").write_text("[broken")
    few_shot.load(root, cache=True)  # decoded again
    kept.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"has no photos.decoded.json beside it"):
        few_shot.load(kept)


def test_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folders(tmp_path / "photos")
    monkeypatch.setattr(image_data.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"--cache cannot write to .*; go without it"):
        few_shot.load(root, cache=True)


def test_a_full_disk_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_store, "_write_images", full)
    with pytest.raises(OSError, match=r"images.npy cannot be written: .*No space left.*TMPDIR"):
        few_shot.load(folders(tmp_path))
