"""The files of a folder, a tar archive or a zip archive, read alike and never unpacked to disk.

Names are relative, with "/" between. An archive holds what extracting it would leave: of a name
that comes twice the last member counts, hard and symbolic links lead to what they name, but only
within the archive, and a member whose name leads out of it is passed over.
"""

from __future__ import annotations

import os
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE, FOLDER = "file", "folder"
LOST = "lost"  # a link that leads to nothing within reach
OTHER = "other"  # a pipe, socket or device: never opened
LINKS = 40  # followed in one path, as Linux has it
HIDDEN = {"__MACOSX", "@eaDir", "lost+found"}  # and whatever begins with a dot
SEARCHED = 10_000  # folders, at most, for one that holds a data set
Fetch = Callable[..., bytes]  # (name, size=-1): a file's first bytes, or all


def open_tree(path: Path) -> Folder | Archive:
    """What reads the folder or the archive."""
    return Folder(path) if path.is_dir() else Archive(path)


def is_archive(path: Path) -> bool:
    """Whether it is a tar or zip file."""
    return path.is_file() and (tarfile.is_tarfile(path) or zipfile.is_zipfile(path))


def stamp(path: Path) -> str:
    """Another text as soon as the file changes: ctime moves even where mtime is put back."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def shown(name: object) -> str:
    """A path or name on one line; bytes that are no UTF-8 appear as \\xNN."""
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    control = ("Cc", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in control else c
        for c in text
    )


def visible(entries: dict[str, str]) -> dict[str, str]:
    """Those that are not hidden, in order."""
    return {
        name: kind
        for name, kind in sorted(entries.items())
        if not name.startswith(".") and name not in HIDDEN
    }


def locate(
    tree: Folder | Archive, kinds: dict[str, Callable[[dict[str, str]], bool]]
) -> tuple[str, str] | None:
    """(kind, folder) of the data set: what one of `kinds` knows by its entries, nearest to the top.

    None if there is none; ValueError if there are several.
    """
    level, searched = [""], 0
    while level and searched < SEARCHED:
        found, below = [], []
        for folder in level[: SEARCHED - searched]:
            try:
                entries = visible(tree.list(folder))
            except OSError:  # not for us to read, or a circle of links
                if not folder:
                    raise
                continue
            found += [(kind, folder) for kind, knows in kinds.items() if knows(entries)]
            below += [f"{folder}/{name}" if folder else name
                      for name, kind in entries.items() if kind == FOLDER]  # fmt: skip
        if len(found) > 1:
            names = ", ".join(shown(folder or ".") for _, folder in found)
            raise ValueError(
                f"{shown(tree.path)} holds {len(found)} data sets ({names}): give the folder of "
                "one of them, from an archive after unpacking it"
            )
        if found:
            return found[0]
        level, searched = below, searched + len(level)
    return None


class Folder:
    """A folder on disk."""

    def __init__(self, path: Path):
        self.path = path

    def list(self, folder: str) -> dict[str, str]:
        """{name: kind} of what it holds; a link is what it leads to."""
        with os.scandir(self.path / folder) as entries:
            return {entry.name: _kind_on_disk(entry) for entry in entries}

    def read(self, names: Sequence[str]) -> Fetch:
        def fetch(name: str, size: int = -1) -> bytes:
            with open(self.path / name, "rb") as file:
                return file.read(size)

        return fetch


def _kind_on_disk(entry: os.DirEntry) -> str:
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
    except OSError:  # a circle of links
        return LOST
    return LOST if entry.is_symlink() else OTHER


@dataclass(frozen=True)
class _Link:
    target: str


_Node = Any  # dict: a folder; a TarInfo or ZipInfo: a file; _Link, LOST or OTHER


class Archive:
    """A tar or zip archive. ValueError if it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.root: dict[str, _Node] = {}
        self.kind = "tar" if tarfile.is_tarfile(path) else "zip"
        with self._whole():
            members = _tar_members if self.kind == "tar" else _zip_members
            for name, node in members(path):
                self._put(name, node)

    def list(self, folder: str) -> dict[str, str]:
        """As `Folder.list`."""
        kinds = {}
        for name in self._find(folder):
            node = self._find(f"{folder}/{name}")
            kind = FOLDER if isinstance(node, dict) else FILE
            kinds[name] = node if isinstance(node, str) else kind
        return kinds

    def read(self, names: Sequence[str]) -> Fetch:
        """Reads these files at once, in the order of the archive."""
        nodes = {name: self._find(name) for name in names}
        with self._whole():
            reader = _tar_contents if self.kind == "tar" else _zip_contents
            contents = reader(self.path, {id(node): node for node in nodes.values()})

        def fetch(name: str, size: int = -1) -> bytes:
            whole = contents[id(nodes[name])]
            return whole if size < 0 else whole[:size]

        return fetch

    def _put(self, name: str, node: _Node) -> None:
        *parents, last = [part for part in name.split("/") if part not in ("", ".")] or [""]
        if ".." in (*parents, last) or not last:
            return
        folder = self.root
        for i, part in enumerate(parents):
            if isinstance(folder.get(part), _Link):
                inner = self._find("/".join(parents[: i + 1]))
            else:
                inner = folder.get(part)
            if not isinstance(inner, dict):
                inner = folder[part] = {}
            folder = inner
        if isinstance(node, tarfile.TarInfo) and node.islnk():
            # What stands there now, as extraction has it; a link itself, not what it leads to.
            above, _, name = node.linkname.rpartition("/")
            there = self._find(above)
            node = there.get(name, LOST) if isinstance(there, dict) else LOST
        if not (node == {} and isinstance(folder.get(last), dict)):
            folder[last] = node

    def _find(self, name: str) -> _Node:
        """Where a path leads, links followed as a file system follows them; LOST: out, or away."""
        walked, ahead, links = [self.root], name.split("/"), 0
        while ahead:
            part, *ahead = ahead
            if part in ("", "."):
                continue
            if part == "..":
                walked.pop()
                if not walked:
                    return LOST
                continue
            node = walked[-1].get(part, LOST) if isinstance(walked[-1], dict) else LOST
            if isinstance(node, _Link):
                links += 1
                if links > LINKS or node.target.startswith("/"):
                    return LOST
                ahead = [*node.target.split("/"), *ahead]
            elif node == LOST:
                return LOST
            else:
                walked.append(node)
        return walked[-1]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        # Damaged bytes raise whatever the reader stumbles over; none of it is our own.
        except Exception as error:
            raise ValueError(
                f"{shown(self.path)} is no whole {self.kind} archive ({error}); copy or fetch it "
                "again"
            ) from error


def _tar_members(path: Path) -> Iterator[tuple[str, _Node]]:
    end = 0
    with tarfile.open(path) as archive:
        for member in archive:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.issym():
                yield member.name, _Link(member.linkname)
            elif member.isdir():
                yield member.name, {}
            else:
                yield member.name, member if member.isfile() or member.islnk() else OTHER
        # tarfile takes an archive cut between two members for whole. Wanted are the empty block
        # after the last one, and the checksum at the very end of a compressed file.
        if archive.fileobj.tell() < end + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")
        while archive.fileobj.read(2**20):
            pass


def _tar_contents(path: Path, members: dict[int, tarfile.TarInfo]) -> dict[int, bytes]:
    # In order: a compressed archive is unpacked once, and never wound back.
    order = sorted(members.items(), key=lambda item: item[1].offset_data)
    contents = {}
    with tarfile.open(path) as archive:
        for key, member in order:
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is no file"
            contents[key] = file.read()
    return contents


def _zip_members(path: Path) -> Iterator[tuple[str, _Node]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, mode = info.filename, info.external_attr >> 16
            if not info.flag_bits & 0x800:  # not marked as UTF-8, which most programs write anyway
                name = name.encode("cp437").decode("utf-8", "surrogateescape")
            if info.is_dir():
                yield name, {}
            elif stat.S_ISLNK(mode):
                yield name, _Link(os.fsdecode(archive.read(info)))
            else:
                yield name, info if stat.S_ISREG(mode) or not stat.S_IFMT(mode) else OTHER


def _zip_contents(path: Path, members: dict[int, zipfile.ZipInfo]) -> dict[int, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {key: archive.read(info) for key, info in members.items()}
