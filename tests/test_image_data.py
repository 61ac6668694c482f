"""Images of one's own: the layouts, the parts, the sampler, and what is refused in what words."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import few_shot
import image_store
from test_image_files import SIDE, folders


def array(classes: int = 5, images: int = 3, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 [classes, images, 12, 12, 3], or of another shape."""
    shape = shape or (SIDE, SIDE, 3)
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (classes, images, *shape), dtype=np.uint8)


def archives(root: Path, prefix: str = "set", **arrays: Any) -> Path:
    """``set_train_a.npz``, ``set_train_b.npz``, ``set_val.npz`` and ``set_test.npz``."""
    root.mkdir(exist_ok=True)
    for number, part in enumerate(("train_a", "train_b", "val", "test")):
        np.savez(root / f"{prefix}_{part}.npz", **{"images": array(seed=number), **arrays})
    return root


def one_archive(path: Path, **arrays: Any) -> Path:
    """15 classes, five in each part, not in order."""
    split = np.array(["train", "val", "test"] * 5)
    np.savez(path, **{"images": array(15), "split": split, **arrays})
    return path


def class_folders(root: Path, names: list[str]) -> Path:
    """Class folders alone."""
    made = sorted(folders(root.parent / "made", classes=-(-len(names) // 3)).glob("*/*"))
    root.mkdir()
    for folder, name in zip(made, names, strict=False):
        folder.rename(root / name)
    return root


def counts(data: few_shot.FewShotData) -> list[int]:
    return [len(part.names) for part in (data.train, data.val, data.test)]


def image(part: image_store.Images, row: int, number: int) -> np.ndarray:
    return part.pixels[part.starts[row] + number].numpy()


def test_folder_of_class_folders_is_split_by_a_seed(tmp_path: Path) -> None:
    data = few_shot.load(class_folders(tmp_path / "photos", [f"c{n:02}" for n in range(25)]))
    assert counts(data) == [16, 4, 5]
    names = [name for part in (data.train, data.val, data.test) for name in part.names]
    assert sorted(names) == [f"c{number:02}" for number in range(25)]
    assert names != sorted(names)
    assert data.notes == (
        "the classes are split here, by seed 0: 64 / 16 / 20 % to train, val and test",
    )
    again = few_shot.load(tmp_path / "photos")
    assert [part.names for part in (again.train, again.val, again.test)] == [
        part.names for part in (data.train, data.val, data.test)
    ]


def test_a_class_called_train(tmp_path: Path) -> None:
    names = [*(f"c{number}" for number in range(14)), "train"]
    data = few_shot.load(class_folders(tmp_path / "vehicles", names))
    assert sum(counts(data)) == 15
    assert "train" in (*data.train.names, *data.val.names, *data.test.names)


def test_archives_named_by_part(tmp_path: Path) -> None:
    archives(tmp_path)
    np.savez(tmp_path / "other.npz", images=array())
    data = few_shot.load(tmp_path)
    assert counts(data) == [10, 5, 5]
    assert data.title == "set, 12x12, colour"
    assert data.notes == ("left out, as no part is in their names: other.npz",)
    assert np.array_equal(image(data.train, 6, 2), array(seed=1)[1, 2])
    by_pattern = few_shot.load(tmp_path / "set_*.npz")
    assert by_pattern.notes == ()
    assert by_pattern.ink() == data.ink()
    assert few_shot.load(str(tmp_path / "set_[tv]*.npz")).ink() == data.ink()


def test_archive_with_an_array_of_parts(tmp_path: Path) -> None:
    names = np.array([f"kind {number}" for number in range(15)])
    data = few_shot.load(one_archive(tmp_path / "mine.npz", classes=names))
    assert counts(data) == [5, 5, 5]
    assert data.val.names == ("kind 1", "kind 4", "kind 7", "kind 10", "kind 13")
    assert np.array_equal(image(data.val, 1, 2), array(15)[4, 2])


def test_archive_without_parts_is_split_here(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=array(25, 3, 10, 9))
    data = few_shot.load(tmp_path / "mine.npz")
    assert counts(data) == [16, 4, 5]
    assert (data.channels, data.size) == (1, (10, 9))
    assert "split here, by seed 0" in data.notes[0]


def test_archives_resized_and_of_unequal_numbers(tmp_path: Path) -> None:
    archives(tmp_path)
    np.savez(tmp_path / "set_train_b.npz", images=array(4, 7, 20, 16, 3))
    with pytest.raises(ValueError, match=r"of several sizes \(\(12, 12\) in .*--size 84"):
        few_shot.load(tmp_path)
    data = few_shot.load(tmp_path, size=14, cache=True)
    assert data.size == (14, 14)
    assert data.train.counts == (3,) * 5 + (7,) * 4
    assert data.notes == ("--cache is for folders of images; an archive is read at once",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": array().astype(np.float32)}, r"is float32 \[5, 3, 12, 12, 3\]; uint8"),
        ({"images": array()[:, 0, :, 0]}, r"is uint8 \[5, 12, 3\]; uint8 \[classes, n, H, W\]"),
        ({"images": array(5, 3, 3, 12, 12)}, r"is uint8 \[5, 3, 3, 12, 12\]"),
        ({"images": array()[:0]}, r"is uint8 \[0, 3, 12, 12, 3\]"),
        ({"split": np.array(["train"] * 4)}, r"'split' .* has 4 values, among them \['train'\]"),
        ({"split": np.array(["Train"] * 15)}, r"among them \['Train'\]; train, val or test"),
        ({"split": np.array(["train", "val", "val"] * 5)}, "has nothing for test; give train"),
        ({"classes": np.array(["a", "b"])}, "'classes' .* has 2 names for 15 classes"),
        ({"classes": np.array(["a"] * 15)}, "class 'a' is in train and again in val"),
        ({"classes": np.array([object()] * 15)}, "'classes' in .* is broken: Object arrays"),
    ],
)
def test_wrong_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        few_shot.load(one_archive(tmp_path / "mine.npz", **arrays))


def test_broken_archives(tmp_path: Path) -> None:
    path = one_archive(tmp_path / "mine.npz")
    whole = path.read_bytes()
    for broken in (b"no archive", b"", whole[:1000]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read as an archive of arrays"):
            few_shot.load(path)
    path.write_bytes(whole[:2000] + b"xx" + whole[2002:])  # a wrong byte in the images
    with pytest.raises(ValueError, match=r"'images' in .* is broken: .*; write or fetch it again"):
        few_shot.load(path)
    np.savez(path, pictures=array())
    with pytest.raises(ValueError, match="expected an array named 'images'"):
        few_shot.load(path)


def test_archives_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is named by part, train; give its folder, or a pattern"):
        few_shot.load(archives(tmp_path) / "set_train_a.npz")
    (tmp_path / "set_val.npz").unlink()
    with pytest.raises(ValueError, match="has nothing for val; give train, val and test"):
        few_shot.load(tmp_path)
    archives(tmp_path, "another")
    with pytest.raises(ValueError, match=r"2 sets are named by part \(another\*, set\*\)"):
        few_shot.load(tmp_path)
    np.savez(tmp_path / "another_val.npz", images=array(5, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="are grey in one file and in colour in another"):
        few_shot.load(tmp_path / "another_*.npz")


def test_a_class_in_two_parts(tmp_path: Path) -> None:
    folders(tmp_path)
    (tmp_path / "test" / "test-0").rename(tmp_path / "test" / "train-3")
    with pytest.raises(ValueError, match="class 'train-3' is in train and again in test; a class"):
        few_shot.load(tmp_path)


def test_a_part_is_missing(tmp_path: Path) -> None:
    folders(tmp_path)
    (tmp_path / "val").rename(tmp_path / "validation")
    with pytest.raises(ValueError, match=r"has train/, test/ but no val/; give all three"):
        few_shot.load(tmp_path)


def test_a_part_without_classes(tmp_path: Path) -> None:
    folders(tmp_path)
    for file in (tmp_path / "val").glob("*/*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no class with images for val; it has 10 classes"):
        few_shot.load(tmp_path)


def test_what_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data at .*nowhere; give a folder of images"):
        few_shot.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no data at .*\*.npz"):
        few_shot.load(tmp_path / "*.npz")
    with pytest.raises(ValueError, match=r"holds no folders of images .* no Alphabet/character"):
        few_shot.load(tmp_path)
    (tmp_path / "page.txt").write_text("words")
    with pytest.raises(ValueError, match=r"page.txt holds no folders of images"):
        few_shot.load(tmp_path / "page.txt")
    with pytest.raises(ValueError, match="--size 16 is for images of your own; the digits are 8x8"):
        few_shot.load(size=16)


def test_classes_called_characters_are_no_omniglot(tmp_path: Path) -> None:
    heroes = class_folders(tmp_path / "heroes", [f"character{n}" for n in range(15)])
    assert sum(counts(few_shot.load(heroes))) == 15


def uneven(root: Path) -> image_store.Images:
    """Training images of five classes with 3, 3, 3, 3 and 9 images."""
    folders(root)
    more = folders(root / "more", classes=1, images=9, seed=1) / "train" / "train-0"
    for file in more.iterdir():
        file.rename(root / "train" / "train-4" / file.name)
    data = few_shot.load(root)
    assert data.train.counts == (3, 3, 3, 3, 9)
    return data.train


def test_unequal_numbers_are_all_drawn_from(tmp_path: Path) -> None:
    images = uneven(tmp_path)
    sampler = few_shot.TaskSampler(images, ways=5, shots=1, targets=2, tasks=2)
    place = {row.numpy().tobytes(): index for index, row in enumerate(images.pixels)}
    seen = []
    for _ in range(50):
        x_support, y_support, x_target, y_target = sampler.sample()
        assert (x_support.shape, x_target.shape) == ((2, 5, 3, SIDE, SIDE), (2, 10, 3, SIDE, SIDE))
        for task in range(2):
            x = torch.cat([x_support[task], x_target[task]]).mul(255).round().to(torch.uint8)
            drawn = [place[one.movedim(0, -1).contiguous().numpy().tobytes()] for one in x]
            assert len(set(drawn)) == 15  # no image twice
            kinds = [sum(index >= start for start in images.starts) - 1 for index in drawn]
            labels = torch.cat([y_support[task], y_target[task]]).tolist()
            assert len(set(zip(kinds, labels, strict=True))) == 5  # a class has one label
            seen += drawn
    assert set(seen) == {
        start + number
        for start, count in zip(images.starts, images.counts, strict=True)
        for number in range(count)
    }


def test_photographs_are_not_turned(tmp_path: Path) -> None:
    images = uneven(tmp_path)
    with pytest.raises(ValueError, match=r"6 ways need .* there are 5 in train: train-0 has 3, .*"):
        few_shot.TaskSampler(images, 6, 1, 1, 1)


def test_flips_by_chance(tmp_path: Path) -> None:
    images = uneven(tmp_path)
    plain = few_shot.TaskSampler(images, 5, 1, 2, tasks=20).sample()
    mirrored = few_shot.TaskSampler(images, 5, 1, 2, tasks=20, flip=True).sample()
    for before, after, labels in ((plain[0], mirrored[0], 1), (plain[2], mirrored[2], 3)):
        same = (before == after).flatten(2).all(-1)
        flipped = (before.flip(-1) == after).flatten(2).all(-1)
        assert (same ^ flipped).all()
        assert 0.3 < flipped.float().mean() < 0.7
        assert torch.equal(plain[labels], mirrored[labels])
    with pytest.raises(ValueError, match="--flip is for photographs; characters come in quarter"):
        few_shot.TaskSampler(few_shot.load().train, 5, 1, 2, 1, flip=True)


def test_too_few_images_say_of_which_class(tmp_path: Path) -> None:
    images = uneven(tmp_path)
    message = (
        r"1 shots and 4 targets need 5 images of each class in train: train-0 has 3, train-1 has 3,"
        r" train-2 has 3, train-3 has 3$"
    )
    with pytest.raises(ValueError, match=message):
        few_shot.TaskSampler(images, 5, 1, 4, 1)


def test_a_long_list_of_classes_is_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=array(25))
    images = few_shot.load(tmp_path / "mine.npz").train
    with pytest.raises(ValueError, match=r": mine.* has 3 and 6 more classes$"):
        few_shot.TaskSampler(images, 5, 1, 4, 1)


def test_another_process_maps_the_file(tmp_path: Path) -> None:
    data = few_shot.load(archives(tmp_path))
    expected = data.val.pixels.clone()  # from now on the pixels are there, and not sent
    assert len(pickle.dumps(data)) < 10_000
    # A function that any process can import; what it cannot, a pool would wait for without end.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(attrgetter("pixels"), (data.val,)).get(timeout=120)
        assert torch.equal(found, expected)
    again = few_shot.load(data.source)
    assert (again.train, again.title) == (data.train, data.title)


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    archives(tmp_path / "data")
    (tmp_path / "temporary").mkdir()
    code = (
        "import few_shot, sys; data = few_shot.load(sys.argv[1]); print(data.source);"
        "assert data.source.exists()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "data"],
        env={
            "TMPDIR": str(tmp_path / "temporary"),
            "PYTHONPATH": str(Path(few_shot.__file__).parent),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "temporary") in run.stdout
    assert list((tmp_path / "temporary").iterdir()) == []
    data = few_shot.load(tmp_path / "data")
    image_store.remove_temporary(data.source)
    assert not data.source.parent.exists()
    image_store.remove_temporary(tmp_path / "data" / "set_val.npz")  # not one of its own
    assert (tmp_path / "data" / "set_val.npz").exists()


def test_a_kill_while_writing_leaves_no_description_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folders(tmp_path / "photos")
    kept = few_shot.load(root, cache=True).source
    (root / "train" / "train-0" / "0.png").unlink()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_store.json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        few_shot.load(root, cache=True)
    monkeypatch.undo()
    assert not kept.with_suffix(".json").exists()
    assert few_shot.load(root, cache=True).train.counts == (2, 3, 3, 3, 3)


@pytest.mark.parametrize(
    ("size", "blocks", "features"),
    [(28, 4, 1), (32, 4, 4), (84, 4, 25), (8, 3, 1), ((84, 60), 4, 15)],
)
def test_network_for_any_size(size: Any, blocks: int, features: int) -> None:
    net = few_shot.conv_net(3, ways=5, filters=6, size=size)
    assert sum(name.startswith("conv") for name, _ in net.named_children()) == blocks
    assert net.head.in_features == 6 * features
    height, width = (size, size) if isinstance(size, int) else size
    assert net(torch.rand(2, 3, height, width)).shape == (2, 5)
