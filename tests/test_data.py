"""Image sets: sources, statistics, held-out images, the cache, and each error with its way out."""

import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tab import _cifar10
from tab.data import load_dataset

CLASSES = ("apple", "pear")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    """3 train and 2 test pictures a class, PNG 32×32; colours tell who is who."""
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "pics" / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (100 * label, 10 * i, 255 if split == "test" else 0)
                Image.new("RGB", (32, 32), colour).save(tmp_path / f"pics/{split}/{name}/{i}.png")
    return tmp_path / "pics"


def pack(folder, archive, mode="w:xz", prefix="top"):
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, prefix)
    return archive


# -- folders and archives --------------------------------------------------------------------------


def test_folder(folder, root):
    steps = []
    data = load_dataset(str(folder), root=root, progress=lambda *step: steps.append(step))
    assert data.name == "folder:pics" and data.classes == CLASSES
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and len(data.test) == 4
    colours = data.train.images[:, 0, 0].tolist()
    assert colours == [[100 * label, 10 * i, 0] for label in (0, 1) for i in (0, 1, 2)]
    assert (data.test.images[..., 2] == 255).all()
    assert steps == [(10, 10, "decoding pictures")]
    assert "6 train, 4 test" in data.note and "JPEG" not in data.note


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


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["top/deep", "."])
def test_archive_is_the_folder(folder, root, tmp_path, mode, prefix):
    data = load_dataset(pack(folder, tmp_path / "pics.tar.any", mode, prefix), root=root)
    expected = load_dataset(folder, root=root)
    assert data.fingerprint == expected.fingerprint and data.classes == expected.classes
    assert data.name == "folder:pics.tar.any"


def test_archive_cannot_write_outside(root, tmp_path, folder):
    archive = tmp_path / "evil.tar"
    pack(folder, archive, "w")
    with tarfile.open(archive, "a") as tar:
        tar.add(folder / "train/apple/0.png", "../../train/apple/escaped.png")
    assert len(load_dataset(archive, root=root).train) == 7
    assert not list(tmp_path.parent.rglob("escaped.png"))


def test_cifar_class_order(tmp_path, root):
    for split in ("train", "test"):
        for i, name in enumerate(_cifar10.CLASSES):
            (tmp_path / "c" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "c" / split / name / "a.jpg")
    data = load_dataset(tmp_path / "c", root=root)
    assert data.classes == _cifar10.CLASSES
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(10))
    assert "lossy JPEG" in data.note


def one_picture(folder, root, image, name="a.png", **options):
    """What becomes of `image` as the first training picture."""
    (folder / "train/apple/0.png").unlink()
    image.save(folder / "train/apple" / name, **options)
    data = load_dataset(folder, root=root)
    index = sorted(os.listdir(folder / "train/apple")).index(name)
    return data.train.images[index], data.note


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (40, 255), (40, 40, 40)),
        ("LA", (40, 0), (255, 255, 255)),  # transparent: white shows
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("I;16", 0x4D00, (77, 77, 77)),
    ],
)
def test_png_modes(folder, root, mode, colour, expected):
    picture, note = one_picture(folder, root, Image.new(mode, (32, 32), colour))
    assert (picture == torch.tensor(expected, dtype=torch.uint8)).all() and "resized" not in note


def test_cmyk_and_palette(folder, root):
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # red
    picture, _ = one_picture(folder, root, cmyk, "a.jpg", quality=100)
    assert (picture.int() - torch.tensor([255, 0, 0])).abs().max() < 8
    palette = Image.new("RGB", (32, 32), (10, 200, 30)).quantize(4)
    palette.save(folder / "train/apple/b.png")
    assert load_dataset(folder, root=root).train.images[3, 5, 5].tolist() == [10, 200, 30]


def test_resized_and_turned(folder, root):
    left_red = Image.new("RGB", (64, 128), "blue")
    left_red.paste("red", (0, 0, 32, 128))
    picture, note = one_picture(folder, root, left_red)
    assert "1 of them resized to 32×32" in note
    assert picture[:, 2].tolist() == [[255, 0, 0]] * 32
    assert picture[:, 29].tolist() == [[0, 0, 255]] * 32
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: left comes to the top
    left_red.save(folder / "train/apple/a.png", exif=exif)
    turned = load_dataset(folder, root=root).train.images[2]
    assert turned[2].tolist() == [[255, 0, 0]] * 32 and turned[29].tolist() == [[0, 0, 255]] * 32


def test_hidden_files_are_passed_over(folder, root, tmp_path):
    for file in (".DS_Store", "train/.DS_Store", "train/apple/._0.png"):
        (folder / file).write_bytes(b"?")
    assert len(load_dataset(folder, root=root).train) == 6
    assert len(load_dataset(pack(folder, tmp_path / "a.tar"), root=root).train) == 6


def no_pictures(folder):
    (folder / "train/apple/1.png").write_text("hello")
    return r"train/apple/1\.png is no whole JPEG or PNG .* replace or remove"


def truncated(folder):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "test/pear/1.jpg")
    os.truncate(folder / "test/pear/1.jpg", 600)
    return r"test/pear/1\.jpg is no whole JPEG"


def altered(folder):
    data = bytearray((folder / "test/pear/1.png").read_bytes())
    data[-20] ^= 255
    (folder / "test/pear/1.png").write_bytes(data)
    return r"test/pear/1\.png is no whole JPEG or PNG"


def other_format(folder):
    Image.new("RGB", (4, 4)).save(folder / "train/pear/x.gif")
    return r"train/pear/x\.gif is no whole JPEG or PNG"


def empty_class(folder):
    for file in (folder / "test/pear").iterdir():
        file.unlink()
    return r"test/pear is empty; add pictures"


def class_only_in_train(folder):
    (folder / "train/plum").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "train/plum/x.png")
    return r"train has the classes plum, test has not"


def class_only_in_test(folder):
    (folder / "train/pear").rename(folder / "train/pears")
    return r"(train has the classes pears|test has the classes pear), "


def one_class(folder):
    for split in ("train", "test"):
        for file in (folder / split / "pear").iterdir():
            file.unlink()
        (folder / split / "pear").rmdir()
    return r"has 1 classes, but 2 or more"


def no_test_folder(folder):
    (folder / "test").rename(folder / "val")
    return r"has no (folder|pictures in) 'test'"


FAULTS = [
    *(no_pictures, truncated, altered, other_format, empty_class),
    *(class_only_in_train, class_only_in_test, one_class),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_folders_and_archives(folder, root, tmp_path, fault):
    said = fault(folder)
    with pytest.raises(ValueError, match=said):
        load_dataset(folder, root=root)
    with pytest.raises(ValueError, match=said):
        load_dataset(pack(folder, tmp_path / "a.tar.xz"), root=root)
    assert not (root / "cache").exists()


def test_layout_faults(folder, root, tmp_path):
    deep = folder / "train/apple/sub"
    deep.mkdir()
    (folder / "train/apple/1.png").rename(deep / "1.png")
    with pytest.raises(ValueError, match="sub is a folder within a class"):
        load_dataset(folder, root=root)
    with pytest.raises(ValueError, match=r"apple/sub/1\.png lies too deep"):
        load_dataset(pack(folder, tmp_path / "a.tar"), root=root)
    deep.rename(folder / "elsewhere")
    (folder / "train/readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"readme\.txt is no class folder"):
        load_dataset(folder, root=root)
    (folder / "test").rename(folder / "val")
    (folder / "train/readme.txt").unlink()
    with pytest.raises(ValueError, match=r"no folder 'test', it holds elsewhere, train, val"):
        load_dataset(folder, root=root)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_truncated_and_altered_archives_are_named(folder, root, tmp_path, mode):
    archive = pack(folder, tmp_path / "a.tar", mode)
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1]
    # Within the last member; for a plain archive also exactly after it, where nothing looks wrong.
    cuts = {"w": [last.offset_data + 10, last.offset_data + 512]}.get(mode, [len(whole) - 12])
    bad = [whole[:cut] for cut in (*cuts, len(whole) // 2)]
    if mode != "w":
        middle = len(whole) // 2
        bad.append(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    for data in bad:
        archive.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar is no whole tar archive .* fetch it again"):
            load_dataset(archive, root=root)


def test_unknown_sets_are_named(tmp_path, folder, root):
    with pytest.raises(ValueError, match=r"'cifar100'; did you mean 'cifar10'\?.*Choose cifar10"):
        load_dataset("cifar100", root=root)
    with pytest.raises(ValueError, match=r"did you mean '.*/pics'\?"):
        load_dataset(str(tmp_path / "pisc"), root=root)
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is no whole tar archive"):
        load_dataset(str(file), root=root)


# -- the cache -------------------------------------------------------------------------------------


def test_altered_and_truncated_caches_are_named(folder, root):
    load_dataset(folder, root=root)
    (file,) = (root / "cache").iterdir()
    whole = file.read_bytes()
    data = bytearray(whole)
    data[len(data) // 3] ^= 1  # within the images
    for bad in (bytes(data), whole[: len(whole) // 2], b""):
        file.write_bytes(bad)
        with pytest.raises(OSError, match=r"pics-\w+\.npz is truncated or altered .* delete it"):
            load_dataset(folder, root=root)
    file.unlink()
    assert len(load_dataset(folder, root=root).train) == 6


def test_a_cache_is_never_unpickled(folder, root):
    load_dataset(folder, root=root)
    (file,) = (root / "cache").iterdir()
    with np.load(file) as npz:
        arrays = dict(npz)
    np.savez(file, **{**arrays, "name": np.array([{"a": "dict"}], dtype=object)})
    with pytest.raises(OSError, match="altered"):
        load_dataset(folder, root=root)


def test_root_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="TAB_DATA"):
        load_dataset(folder, root=tmp_path / "file")


def test_root_from_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "there"))
    load_dataset(folder)
    assert [file.suffix for file in (tmp_path / "there/cache").iterdir()] == [".npz"]
