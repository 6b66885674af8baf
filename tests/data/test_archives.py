"""A folder and an archive of the same tree are the same data set, whatever lies in the tree."""

import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pictures import build, pack, pack_zip
from typer.testing import CliRunner

from tab.cli.main import app
from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


def picture(colour=(9, 8, 7), form="PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, form, **options)
    return out.getvalue()


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


# -- what only an archive can hold -----------------------------------------------------------------


def add(tar, name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def test_of_a_member_stored_twice_the_last_counts(folder, root, tmp_path):
    archive = pack(folder, tmp_path / "a.tar", "w")
    whole = load_dataset(archive, root=root)
    with tarfile.open(archive, "a") as tar:
        add(tar, "top/train/apple/1.png", picture((1, 2, 3)))
    data = load_dataset(archive, root=root)
    assert len(data.train) == 6 and data.train.images[1, 0, 0].tolist() == [1, 2, 3]
    assert data.train.images[0].equal(whole.train.images[0])
    pack_zip(folder, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as made, pytest.warns(match="Duplicate"):
        made.writestr("top/train/apple/1.png", picture((1, 2, 3)))
    assert load_dataset(tmp_path / "a.zip", root=root).fingerprint == data.fingerprint


def test_a_hard_link_is_what_stood_there_then(folder, root, tmp_path):
    """As extraction has it: a later member of that name replaces the name, not the file."""
    archive = pack(folder, tmp_path / "a.tar", "w")
    with tarfile.open(archive, "a") as tar:
        add(tar, "top/train/apple/z.png", kind=tarfile.LNKTYPE, link="top/train/apple/2.png")
        add(tar, "top/train/apple/2.png", picture((1, 2, 3)))
    images = load_dataset(archive, root=root).train.images[:4, 0, 0].tolist()
    assert images == [[0, 0, 0], [0, 10, 0], [1, 2, 3], [0, 20, 0]]


@pytest.mark.parametrize("link", ["/etc/passwd", "../../../../etc/passwd", "gone.png", "z.png"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_lead_nowhere_are_named(folder, root, tmp_path, link, kind):
    archive = pack(folder, tmp_path / "a.tar", "w")
    with tarfile.open(archive, "a") as tar:
        add(tar, "top/train/apple/z.png", kind=kind, link=link)
    said = r"top/train/apple/z\.png is a link to nothing that is here; put the file in its place"
    with pytest.raises(ValueError, match=said):
        load_dataset(archive, root=root)


def test_names_that_lead_out_do_not_matter(folder, root, tmp_path):
    archive = pack(folder, tmp_path / "evil.tar", "w")
    with tarfile.open(archive, "a") as tar:
        for name in ("../../train/apple/up.png", "top/train/../train/apple/in.png", ".."):
            add(tar, name, picture())
        add(tar, "dev", kind=tarfile.CHRTYPE)
        add(tar, "top/train/apple/null.png", kind=tarfile.CHRTYPE)
    data = load_dataset(archive, root=root)
    assert data.fingerprint == load_dataset(folder, root=root).fingerprint
    assert not list(tmp_path.parent.rglob("up.png"))


def test_damaged_and_locked_zips_are_named(folder, root, tmp_path):
    whole = pack_zip(folder, tmp_path / "a.zip").read_bytes()
    start = whole.index(b"top/train/apple/1.png") + 40
    altered = whole[:start] + bytes([whole[start] ^ 255]) + whole[start + 1 :]
    locked = bytearray(whole)
    for at in range(len(whole) - 4):  # the flag of each entry of the table: encrypted
        if whole[at : at + 4] == b"PK\1\2":
            locked[at + 8] |= 1
    for data in (whole[:-30], altered, bytes(locked)):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.zip is no whole .*zip archive.* fetch it again"):
            load_dataset(tmp_path / "a.zip", root=root)


FOLDERS = ["train/apple", "test/pear", "train/new", "./test/new", "store"]
FILES = [f"{folder}/{name}" for folder in FOLDERS for name in ("0.png", "a.png", ".c.png", "note")]
LINKS = [*FILES, "0.png", "a.png", "../../store/a.png", "../apple/1.png", "../../test/pear/1.png"]
MEMBERS = st.one_of(
    st.tuples(st.sampled_from(FILES), st.just(tarfile.REGTYPE), st.just("")),
    st.tuples(st.sampled_from(FILES), st.just(tarfile.SYMTYPE), st.sampled_from(LINKS)),
    st.tuples(st.sampled_from(FILES), st.just(tarfile.LNKTYPE), st.sampled_from(FILES)),
    st.tuples(st.sampled_from(FOLDERS), st.just(tarfile.DIRTYPE), st.just("")),
    st.sampled_from([(f"{split}/linked", tarfile.SYMTYPE, "apple") for split in ("train", "test")]),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(members=st.lists(MEMBERS, min_size=1, max_size=6))
def test_any_archive_is_what_extraction_leaves(tmp_path_factory, members):
    """Against the program tar."""
    place = tmp_path_factory.mktemp("any")
    build(place / "pics")
    archive, out = pack(place / "pics", place / "a.tar", "w", "."), place / "out"
    with tarfile.open(archive, "a") as tar:
        for i, (name, kind, link) in enumerate(members):
            add(tar, name, picture((i, 0, 0)) if kind == tarfile.REGTYPE else b"", kind, link)
    out.mkdir()
    if subprocess.run(["tar", "-xf", archive, "-C", out], capture_output=True).returncode:
        return  # it is refused there; here at most an error, which the other tests show
    found = []
    for path in (out, archive):
        try:
            found.append(load_dataset(path, root=place / "root").fingerprint)
        except ValueError as error:
            found.append(str(error).removeprefix(str(path)))
    assert found[0] == found[1]
