"""Pictures train/<class>/* and test/<class>/* of a folder or archive, as uint8 arrays.

Without a folder `test`, the pictures in `val` are the test set, and the note says so. Without that
either, or of class folders alone, data.test_share says how many are drawn to test on. Hidden files
and folders are no part of a set; other files that are no pictures are passed over, and counted and
named in the note.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from .decode import ENDINGS, Progress, decode_all, looks_like_picture, resized_note, shared_note
from .held_out import Pair, check_share, draw_test
from .tree import FILE, FOLDER, LOST, Archive, Folder, shown, stamp, visible

TRAIN, TESTS = "train", ("test", "val", "valid", "validation")
LAYOUT = "wanted are pictures train/<class>/* and test/<class>/*"


def is_set(entries: dict[str, str]) -> bool:
    """Whether the folder that holds these is a data set."""
    return entries.get(TRAIN) == FOLDER and any(entries.get(name) == FOLDER for name in TESTS)


@dataclass
class Layout:
    """Where the pictures of a set lie."""

    train: str  # the folder of the class folders; "": they lie where the set does
    test: str = ""  # the folder that is the test set; "": there is none
    other: list[str] = field(default_factory=list)  # might be as well, and are not read
    files: dict[str, list[str]] = field(default_factory=dict)  # {"train/cat": names}
    skipped: list[str] = field(default_factory=list)  # no pictures, by name and place


def scan(tree: Folder | Archive, base: str) -> Layout:
    """The files of the set in the folder `base`. ValueError names what lies where it must not."""
    tests = [name for name in TESTS if tree.list(base).get(name) == FOLDER]
    found = Layout(TRAIN, tests[0], tests[1:]) if tests else Layout(_unsplit(tree, base) or "")
    for split in (found.train, *tests[:1]):
        for name, kind in visible(tree.list(_join(base, split))).items():
            place = _join(split, name)
            if kind == FOLDER:
                found.files[place] = _files(tree, base, place, found)
            elif kind == FILE and _meant(name):
                raise ValueError(f"{_at(tree, base, place)} is in no class folder; {LAYOUT}")
            else:
                found.skipped.append(_not_lost(tree, base, place, kind))
    return found


def locate_unsplit(tree: Folder | Archive) -> str | None:
    """The folder of a set without test pictures, which may be the only one within others."""
    folder = ""
    while True:
        below = [name for name, kind in visible(tree.list(folder)).items() if kind == FOLDER]
        if set(TESTS) & set(below):
            return None
        if _unsplit(tree, folder) is not None:
            return folder
        if len(below) != 1:
            return None
        folder = _join(folder, below[0])


def _unsplit(tree: Folder | Archive, base: str) -> str | None:
    """Where below `base` there are folders of pictures: "train", or "", which is `base` itself."""
    for split in (TRAIN, ""):
        place = _join(base, split)
        inner = tree.list(place) if split == "" or tree.list(base).get(split) == FOLDER else {}
        for name in [name for name, kind in visible(inner).items() if kind == FOLDER]:
            files = visible(tree.list(_join(place, name)))
            if any(kind == FILE and _meant(file) for file, kind in files.items()):
                return split
    return None


def _files(tree: Folder | Archive, base: str, folder: str, found: Layout) -> list[str]:
    names = []
    for name, kind in visible(tree.list(_join(base, folder))).items():
        if kind == FOLDER:
            raise ValueError(
                f"{_at(tree, base, folder, name)} is a folder within a class; {LAYOUT}"
            )
        if kind == FILE:
            names.append(name)
        else:
            found.skipped.append(_not_lost(tree, base, f"{folder}/{name}", kind))
    return names


def _not_lost(tree: Folder | Archive, base: str, name: str, kind: str) -> str:
    if kind == LOST:
        raise ValueError(
            f"{_at(tree, base, name)} is a link to nothing that is here; put the file in its "
            "place, or remove it"
        )
    return name


def nothing(tree: Folder | Archive) -> str:
    """Why there is no data set in the tree, in words."""
    folder, entries = "", visible(tree.list(""))
    while list(entries.values()) == [FOLDER] and not {TRAIN, *TESTS} & set(entries):
        folder = _join(folder, *entries)
        entries = visible(tree.list(folder))
    missing = "'train'" if entries.get(TRAIN) != FOLDER else "'test' (nor 'val')"
    here = ", ".join(map(shown, list(entries)[:8])) or "nothing"
    return (
        f"{_at(tree, folder)} has no folder {missing}, it holds {here}; {LAYOUT}, or the Python "
        "version of CIFAR-10 or CIFAR-100"
    )


def key(tree: Folder, base: str) -> str:
    """Another string as soon as a file comes, goes or changes."""
    found = scan(tree, base)
    digest = hashlib.sha256(repr((found.test, found.other, found.skipped)).encode())
    for folder, names in found.files.items():
        for name in names:
            line = f"{folder}/{name}\0{stamp(tree.path / base / folder / name)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read(
    tree: Folder | Archive,
    base: str,
    order: tuple[str, ...],
    side: int,
    fit: str,
    progress: Progress | None,
    share: float,
) -> tuple[tuple[str, ...], Pair, Pair, str]:
    """(classes, train, test, note); classes in `order` if they are just those, else sorted.
    share: data.test_share."""
    found = scan(tree, base)
    holds = ", ".join(map(shown, list(visible(tree.list(base)))[:8]))
    check_share(share, bool(found.test), f"{_at(tree, base)} (it holds {holds})", f"; {LAYOUT}")
    fetch = tree.read([_join(base, d, name) for d, names in found.files.items() for name in names])
    for folder, names in found.files.items():
        for name in names[:]:
            if not _meant(name) and not looks_like_picture(fetch(_join(base, folder, name), 16)):
                names.remove(name)
                found.skipped.append(f"{folder}/{name}")
    classes = _classes(tree, base, found, order)
    names, labels, counts = [], [], []
    for split in (found.train, *[found.test] * bool(found.test)):
        for label, name in enumerate(classes):
            files = found.files[_join(split, name)]
            names += [_join(base, split, name, file) for file in files]
            labels += [label] * len(files)
        counts.append(len(names))

    def contents(start: int, stop: int) -> list[bytes]:
        return [fetch(name) for name in names[start:stop]]

    def at(i: int) -> str:
        return _at(tree, names[i])

    images, resized = decode_all(len(names), contents, at, side, fit, progress)  # train, then test
    n, both = counts[0], np.asarray(labels, np.int64)
    train, test, drawn = (images[:n], both[:n]), (images[n:], both[n:]), ""
    if not found.test:
        train, test, drawn = draw_test(*train, share, _at(tree, base))
    note = f"pictures from {shown(tree.path.name)}: {len(train[1]):,} train, {len(test[1]):,} test"
    note += resized_note(resized, side, fit) + drawn + _note(found, names)
    return tuple(map(shown, classes)), train, test, note + shared_note(train[0], test[0])


def _note(found: Layout, names: list[str]) -> str:
    note = ""
    if found.test not in ("test", ""):
        note += f"; there is no folder test: the pictures in {found.test} are the test set"
    if found.other:
        note += f"; not read: {', '.join(found.other)}"
    if found.skipped:
        one, few = len(found.skipped) == 1, ", ".join(map(shown, found.skipped[:3]))
        what = "file that is no picture" if one else "files that are no pictures"
        more = ", …" * (len(found.skipped) > 3)
        note += f"; skipped {len(found.skipped):,} {what}: {few}{more}"
    if any(name.lower().endswith((".jpg", ".jpeg")) for name in names):
        note += "; lossy JPEG: accuracy can differ a little from that on the original pixels"
    return note


def _classes(
    tree: Folder | Archive, base: str, found: Layout, order: tuple[str, ...]
) -> tuple[str, ...]:
    path = _at(tree, base)
    train, test = (
        {name.rpartition("/")[2] for name in found.files if name.rpartition("/")[0] == split}
        for split in (found.train, found.test)
    )
    pairs = ((TRAIN, found.test, train - test), (found.test, TRAIN, test - train))
    for here, there, names in pairs:
        if names and found.test:
            raise ValueError(
                f"{path}: {here} has the classes {', '.join(map(shown, sorted(names)))}, {there} "
                "has not; both need the same class folders"
            )
    if len(train) < 2:
        raise ValueError(f"{path} has {len(train)} classes, but 2 or more are needed; {LAYOUT}")
    for name, files in found.files.items():
        if not files:
            raise ValueError(f"{_at(tree, base, name)} is empty; add pictures, or remove the class")
    return order if train == set(order) else tuple(sorted(train))


def _meant(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _at(tree: Folder | Archive, *parts: str) -> str:
    return shown(tree.path.joinpath(*parts))
