"""A folder and an archive of the same tree are the same data set, whatever lies in the tree."""

import os
from pathlib import Path

import pytest
from small_pictures import build, pack, pack_zip, picture
from typer.testing import CliRunner

from tab.cli.main import app
from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


def load_all(folder, root):
    """The set as folder, tar and zip; their data must be the same."""
    sets = [load_dataset(folder, root=root)]
    sets.append(load_dataset(pack(folder, folder.with_name("a.tar"), "w"), root=root))
    sets.append(load_dataset(pack_zip(folder, folder.with_name("a.zip")), root=root))
    for other in sets[1:]:
        assert other.fingerprint == sets[0].fingerprint and other.classes == sets[0].classes
        # The note is the same but for the name of the file.
        assert other.note.split(": ", 1)[1] == sets[0].note.split(": ", 1)[1]
    return sets[0]


# -- what may lie in a tree ------------------------------------------------------------------------


def hard_links(folder):
    for i in range(3):
        os.link(folder / f"train/apple/{i}.png", folder / f"train/apple/z{i}.png")
    return 9, ""


def symbolic_links(folder):
    for i in range(3):
        os.symlink(f"{i}.png", folder / f"train/apple/z{i}.png")
    os.symlink("../pear/1.png", folder / "train/apple/across.png")
    return 10, ""


def class_behind_a_link(folder):
    (folder / "store").mkdir()
    (folder / "train/pear").rename(folder / "store/pears")
    os.symlink("../store/pears", folder / "train/pear")
    return 6, ""


def links_to_links(folder):
    os.symlink("0.png", folder / "train/apple/a.png")
    os.symlink("a.png", folder / "train/apple/b.png")
    return 8, ""


def hidden(folder):
    for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        for place in (folder, folder / "train", folder / "train/apple"):
            (place / name).mkdir()
            (place / name / "0.png").write_bytes(picture())
    for name in (".DS_Store", "train/.DS_Store", "train/apple/._0.png"):
        (folder / name).write_bytes(b"?")
    return 6, ""


def no_pictures(folder):
    for name in ("Thumbs.db", "train/labels.csv", "train/apple/Thumbs.db", "test/pear/notes.txt"):
        (folder / name).write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "test/pear/clip.mp4").write_bytes(b"\0\0\0\x18ftyp")
    return 6, (
        "skipped 4 files that are no pictures: train/labels.csv, train/apple/Thumbs.db, "
        "test/pear/clip.mp4, …"
    )


def pipe(folder):
    os.mkfifo(folder / "train/apple/pipe.png")
    return 6, "skipped 1 file that is no picture: train/apple/pipe.png"


def other_formats(folder):
    for form, name in [
        *(("WEBP", "a.webp"), ("BMP", "b.bmp"), ("GIF", "c.gif"), ("TIFF", "d.tiff")),
        *(("PPM", "e.ppm"), ("PNG", "no_ending"), ("JPEG", "f.JPG"), ("PNG", "G.PNG")),
        *(("JPEG", "jpeg.png"), ("TIFF", "h.TIF")),
    ]:
        (folder / "train/pear" / name).write_bytes(picture(form=form))
    return 16, "lossy JPEG"


def names_that_are_no_utf8(folder):
    for split in ("train", "test"):
        os.rename(folder / split / "pear", os.fsencode(folder / split) + b"/caf\xe9")
    os.rename(folder / "train/apple/0.png", os.fsencode(folder / "train/apple") + b"/\xff 0.png")
    return 6, ""


def names_from_everywhere(folder):
    for split in ("train", "test"):
        (folder / split / "apple").rename(folder / split / "größe, [red] 犬 ☃")
    (folder / "train/pear/0.png").rename(folder / "train/pear/é.png")
    return 6, ""


def val_in_place_of_test(folder):
    (folder / "test").rename(folder / "val")
    return 6, "there is no folder test: the pictures in val are the test set"


def val_beside_test(folder):
    (folder / "val/kiwi").mkdir(parents=True)
    return 6, "not read: val"


def classes_called_train_and_test(folder):
    for split in ("train", "test"):
        (folder / split / "apple").rename(folder / split / "train")
        (folder / split / "pear").rename(folder / split / "test")
    return 6, ""


TREES = [
    *(hard_links, symbolic_links, class_behind_a_link, links_to_links, hidden, no_pictures, pipe),
    *(other_formats, names_that_are_no_utf8, names_from_everywhere, val_in_place_of_test),
    *(val_beside_test, classes_called_train_and_test),
]


@pytest.mark.parametrize("tree", TREES)
def test_folder_tar_and_zip_are_one_set(folder, root, tree):
    count, said = tree(folder)
    data = load_all(folder, root)
    assert len(data.train) == count and len(data.test) == 4
    assert said in data.note and ("skipped" in data.note) == ("skipped" in said)
    assert load_dataset(folder, root=root).note == data.note  # the cache says it too


def test_names_that_are_no_utf8_can_be_printed(folder, root):
    names_that_are_no_utf8(folder)
    assert load_dataset(folder, root=root).classes == ("apple", "caf\\xe9")
    Path(os.fsdecode(os.fsencode(folder / "train/apple") + b"/\xfe.png")).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"train/apple/\\xfe\.png is no whole picture") as error:
        load_dataset(folder, root=root)
    str(error.value).encode()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["top/deep", ".", "/home/user", "test/mine"])
def test_folders_above_do_not_matter(folder, root, tmp_path, mode, prefix):
    data = load_dataset(pack(folder, tmp_path / "pics.tar.any", mode, prefix), root=root)
    expected = load_dataset(folder, root=root)
    assert data.fingerprint == expected.fingerprint and data.classes == expected.classes
    assert data.name == "folder:pics.tar.any"


def test_folders_above_do_not_matter_on_disk(folder, root, tmp_path):
    expected = load_dataset(folder, root=root).fingerprint
    (tmp_path / "some/leading").mkdir(parents=True)
    folder.rename(tmp_path / "some/leading/pics")
    os.symlink("..", tmp_path / "some/circle")
    assert load_dataset(tmp_path / "some", root=root).fingerprint == expected
    build(tmp_path / "some/leading/second")
    with pytest.raises(ValueError, match=r"2 data sets \(leading/pics, leading/second\): give"):
        load_dataset(tmp_path / "some", root=root)


def test_names_are_printed_as_they_are(folder, monkeypatch, tmp_path):
    names_from_everywhere(folder)
    folder.rename(tmp_path / "my [old] :smile: pics")
    monkeypatch.setenv("TAB_DATA", str(tmp_path / "data"))
    ran = CliRunner().invoke(app, ["data", str(tmp_path / "my [old] :smile: pics")])
    assert ran.exit_code == 0
    assert "folder:my [old] :smile: pics" in ran.output and "größe, [red] 犬 ☃" in ran.output
