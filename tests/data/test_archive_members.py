"""What only an archive can hold: members stored twice, links that lead out, damage."""

import io
import subprocess
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_pictures import build, pack, pack_zip, picture

from tab.data.load import load_dataset


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pics")


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
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
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
