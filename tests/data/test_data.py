"""Image sets from folders and archives: what is read, and each error with its way out."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from small_pictures import CLASSES, build, pack, pack_zip

from tab.data import cifar as _cifar
from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


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


def test_test_pictures_that_were_trained_on_are_told(folder, root):
    (folder / "test/pear/again.png").write_bytes((folder / "train/pear/0.png").read_bytes())
    (folder / "test/apple/more.png").write_bytes((folder / "train/pear/1.png").read_bytes())
    note = load_dataset(folder, root=root).note
    assert note.endswith("; 2 of the test pictures are in train, too, pixel by pixel")
    for name in ("pear/again", "apple/more"):
        (folder / f"test/{name}.png").unlink()
    assert "pixel by pixel" not in load_dataset(folder, root=root).note


def test_cifar_class_order(tmp_path, root):
    for split in ("train", "test"):
        for i, name in enumerate(_cifar.CLASSES):
            (tmp_path / "c" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / "c" / split / name / "a.jpg")
    data = load_dataset(tmp_path / "c", root=root)
    assert data.classes == _cifar.CLASSES
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(10))
    assert "lossy JPEG" in data.note


def no_pictures(folder):
    (folder / "train/apple/1.png").write_text("hello")
    return r"train/apple/1\.png is no whole picture .* replace or remove"


def truncated(folder):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(folder / "test/pear/1.jpg")
    os.truncate(folder / "test/pear/1.jpg", 600)
    return r"test/pear/1\.jpg is no whole picture"


def altered(folder):
    data = bytearray((folder / "test/pear/1.png").read_bytes())
    data[-20] ^= 255
    (folder / "test/pear/1.png").write_bytes(data)
    return r"test/pear/1\.png is no whole picture"


def format_that_is_not_read(folder):
    (folder / "train/pear/x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    return (
        r"train/pear/x\.heic is no whole picture \(it does not begin as one; JPEG, .* can be read"
    )


def nothing_in_it(folder):
    (folder / "train/pear/0.png").write_bytes(b"")
    return r"train/pear/0\.png is no whole picture \(it does not begin"


def bomb(folder):
    Image.new("1", (14000, 14000)).save(folder / "train/pear/0.png")
    return r"train/pear/0\.png is no whole picture \(Image size \(196000000 pixels\) exceeds"


def several(folder):
    (folder / "train/pear/0.png").write_bytes(b"")
    (folder / "test/apple/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return (
        r"2 files to replace or remove: .*train/pear/0\.png is no whole picture \(it does .*; "
        r".*test/apple/1\.png is no whole picture \("
    )


def floating_point(folder):
    Image.new("F", (4, 4), 0.5).save(folder / "train/pear/0.tiff")
    return r"train/pear/0\.tiff is no whole picture \(its pixels are floating-point"


def nested(folder):
    (folder / "train/apple/sub").mkdir()
    (folder / "train/apple/1.png").rename(folder / "train/apple/sub/1.png")
    return r"train/apple/sub is a folder within a class; wanted are pictures train/<class>"


def picture_in_no_class(folder):
    (folder / "train/apple/1.png").rename(folder / "train/1.png")
    return r"train/1\.png is in no class folder; wanted are pictures"


def no_pictures_in_a_class(folder):
    for i in range(2):
        (folder / f"test/pear/{i}.png").unlink()
    (folder / "test/pear/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    return r"test/pear is empty; add pictures"


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
    (folder / "test").rename(folder / "elsewhere")
    return r"\(it holds elsewhere, train\) has nothing to test on: give .*; wanted are pictures"


def no_train_folder(folder):
    (folder / "train").rename(folder / "classes")
    return r"has no folder 'train', it holds classes, test; wanted"


def dangling(folder):
    os.symlink("/nowhere/0.png", folder / "train/apple/x.png")
    return r"train/apple/x\.png is a link to nothing that is here; put the file in its place"


def dangling_class(folder):
    os.symlink("nowhere", folder / "test/plum")
    return r"test/plum is a link to nothing that is here"


FAULTS = [
    *(no_pictures, truncated, altered, format_that_is_not_read, nothing_in_it, bomb, several),
    *(
        empty_class,
        floating_point,
        nested,
        picture_in_no_class,
        no_pictures_in_a_class,
        class_only_in_train,
    ),
    *(class_only_in_test, one_class, no_test_folder, no_train_folder, dangling, dangling_class),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_folders_and_archives(folder, root, tmp_path, fault):
    said = fault(folder)
    with pytest.raises(ValueError, match=said):
        load_dataset(folder, root=root)
    with pytest.raises(ValueError, match=said):
        load_dataset(pack(folder, tmp_path / "a.tar.gz", "w:gz"), root=root)
    with pytest.raises(ValueError, match=said):
        load_dataset(pack_zip(folder, tmp_path / "a.zip"), root=root)
    assert not (root / "cache").exists()


def test_what_may_not_be_read_is_named(folder, root, monkeypatch):
    """As for another user's files; whoever runs the tests may be allowed to read all."""

    def refused(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tab.data.tree.os.scandir", refused)
    with pytest.raises(PermissionError, match=r"/pics may not be read: allow it \(chmod\)"):
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
    # What lies in the same folder is not near for that.
    with pytest.raises(ValueError) as error:
        load_dataset(str(tmp_path / "else"), root=root)
    assert "did you mean" not in str(error.value)
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is no whole tar archive"):
        load_dataset(str(file), root=root)
