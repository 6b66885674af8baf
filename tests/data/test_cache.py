"""The cache of a data set: never stale, never in the way."""

import os

import numpy as np
import pytest
import torch
from patience import tick
from PIL import Image
from small_pictures import build, pack, pack_zip

from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


def test_second_load_comes_from_the_cache(folder, root):
    first = load_dataset(folder, root=root)
    steps = []
    second = load_dataset(folder, root=root, progress=lambda *step: steps.append(step))
    assert not steps  # nothing was decoded
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)
    for name in ("name", "classes", "note", "fingerprint"):
        assert getattr(first, name) == getattr(second, name)


def test_a_changed_folder_is_read_again(folder, root):
    first = load_dataset(folder, root=root)
    Image.new("RGB", (32, 32), "white").save(folder / "train/apple/9.png")
    second = load_dataset(folder, root=root)
    assert len(second.train) == 7 and second.fingerprint != first.fingerprint
    file = folder / "train/apple/9.png"
    size = file.stat().st_size
    Image.new("RGB", (32, 32), "black").save(file)
    os.truncate(file, max(size, file.stat().st_size))
    os.utime(file, ns=(0, 0))
    assert load_dataset(folder, root=root).fingerprint != second.fingerprint
    assert len(list((root / "cache").iterdir())) == 1  # the old one is replaced


def overwrite(file, colour):
    """Another picture of the same size, with the time of the first put back."""
    before, was = file.stat(), file.read_bytes()
    tick(file)
    Image.new("RGB", (32, 32), colour).save(file)
    file.write_bytes(file.read_bytes().ljust(len(was), b"\0"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns


def test_a_changed_picture_of_the_same_size_and_time_is_read_again(folder, root):
    """As `cp -p`, `rsync -t` and unpacking leave it."""
    first = load_dataset(folder, root=root)
    overwrite(folder / "train/apple/1.png", (0, 11, 0))
    second = load_dataset(folder, root=root)
    assert second.train.images[1, 0, 0].tolist() == [0, 11, 0]
    assert first.train.images[1, 0, 0].tolist() == [0, 10, 0]


def test_a_changed_target_of_a_link_is_read_again(folder, root, tmp_path):
    (folder / "train/apple/1.png").rename(tmp_path / "aside.png")
    os.symlink(tmp_path / "aside.png", folder / "train/apple/1.png")
    assert load_dataset(folder, root=root).train.images[1, 0, 0].tolist() == [0, 10, 0]
    overwrite(tmp_path / "aside.png", (0, 12, 0))
    assert load_dataset(folder, root=root).train.images[1, 0, 0].tolist() == [0, 12, 0]


def tar(folder, archive):
    return pack(folder, archive, "w")


@pytest.mark.parametrize("packed", [tar, pack_zip])
def test_a_changed_archive_of_the_same_size_and_time_is_read_again(folder, root, tmp_path, packed):
    archive = packed(folder, tmp_path / "a")
    first, before = load_dataset(archive, root=root), archive.stat()
    overwrite(folder / "train/apple/1.png", (0, 11, 0))
    tick(archive)
    packed(folder, archive)
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load_dataset(archive, root=root)
    assert second.train.images[1, 0, 0].tolist() == [0, 11, 0]
    assert second.fingerprint != first.fingerprint


def test_what_was_skipped_is_not_served_stale(folder, root):
    (folder / "train/labels.csv").write_text("a,b")
    assert "labels.csv" in load_dataset(folder, root=root).note
    (folder / "train/labels.csv").unlink()
    assert "skipped" not in load_dataset(folder, root=root).note


def test_a_damaged_cache_is_made_anew(folder, root):
    good = load_dataset(folder, root=root)
    (file,) = (root / "cache").iterdir()
    whole = file.read_bytes()
    data = bytearray(whole)
    data[len(data) // 3] ^= 1  # within the images
    for bad in (bytes(data), whole[: len(whole) // 2], whole[:-1], b"", b"no zip"):
        file.write_bytes(bad)
        assert load_dataset(folder, root=root).fingerprint == good.fingerprint
        assert file.read_bytes() == whole
    file.unlink()
    file.mkdir()  # cannot even be replaced
    with pytest.warns(UserWarning, match="is not cached.* set TAB_DATA to a folder"):
        assert load_dataset(folder, root=root).train.images.equal(good.train.images)


class Bomb:
    def __reduce__(self):
        return (os._exit, (3,))


def test_a_cache_is_never_unpickled(folder, root):
    good = load_dataset(folder, root=root)
    (file,) = (root / "cache").iterdir()
    with np.load(file) as npz:
        arrays = dict(npz)
    np.savez(file, **{**arrays, "name": np.array([Bomb()], dtype=object)})
    assert load_dataset(folder, root=root).name == good.name


def test_a_place_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        with pytest.warns(UserWarning, match="is not cached.* set TAB_DATA to a folder"):
            assert len(load_dataset(folder, root=tmp_path / "file").train) == 6


def test_root_from_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "there"))
    load_dataset(folder)
    assert [file.suffix for file in (tmp_path / "there/cache").iterdir()] == [".npz"]


def test_a_name_that_is_nearly_too_long(folder, root, tmp_path):
    long = tmp_path / ("犬" * 80)  # 240 bytes of 255
    folder.rename(long)
    first, steps = load_dataset(long, root=root), []
    again = load_dataset(long, root=root, progress=lambda *step: steps.append(step))
    assert again.fingerprint == first.fingerprint and not steps
