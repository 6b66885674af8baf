"""Image sets in memory: CIFAR-10, a folder or archive of pictures, Hugging Face's, or `shapes`.

Everything is uint8 (N, S, S, 3) in RGB. What took time to read is cached under the data root:
`root`, else $TAB_DATA, else ./data.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ..checks import unknown
from ..run_config import IMAGE, usual_fit
from . import cache as _cache
from . import cifar as _cifar
from . import huggingface as _huggingface
from . import pictures as _pictures
from . import sequences, shapes
from .dataset import Dataset, Split, dataset_of
from .decode import resized_array
from .held_out import check_share, hold_out
from .tree import FILE, Archive, Folder, is_archive, locate, open_tree, shown, stamp

__all__ = ["Dataset", "Split", "hold_out", "load_dataset", "loader"]

NAMED = ("cifar10", "shapes", "hf", *sequences.TASKS)  # sets that are no files of the user
Progress = Callable[[int, int, str], None]  # (done, total, what)
# What a folder or archive can hold, and what tells it by the entries of a folder.
KINDS = {"pictures": _pictures.is_set, **_cifar.KINDS}


def load_dataset(
    spec: str = "cifar10",
    *,
    size: int = IMAGE,
    fit: Literal["auto", "crop", "stretch"] = "auto",
    test_share: float = 0.0,
    root: str | Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Dataset:
    """The data set that `spec` names.

    "cifar10": the official files, fetched and checksummed by torchvision (download=False: only if
    already there). "shapes" or "shapes:TRAIN/TEST": drawn, with these numbers of images. "recall",
    "copy", "needle", or with sizes "recall:256:20000/2000": sequences of tokens (sequences.py). A
    folder, or an archive of one (.zip, .tar, .tar.gz, .tar.xz, .tar.bz2), at whatever depth:
    pictures train/<class>/*, test/<class>/* (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM), or <class>/*
    alone, or the official Python files of CIFAR-10 or CIFAR-100; read in memory, never unpacked to
    disk. "hf:NAME", with keys "hf:NAME?label=fine_label": Hugging Face's (huggingface.py).
    size, fit: rows and columns of an image, and how pictures become so. test_share: of a set
    without test images, the share of each class that is drawn to test on. All three as data.size,
    data.fit and data.test_share of a recipe, which must be the same.
    ValueError or OSError name the file at fault and the way out.
    """
    root = Path(root or os.environ.get("TAB_DATA") or "data")
    spec, fit = str(spec), usual_fit(size) if fit == "auto" else fit
    if spec.split(":")[0] in NAMED and not spec.startswith(_huggingface.PREFIX):
        check_share(test_share, True, spec)
    if spec == "cifar10":
        return _cifar10(root, download, size, fit)
    if spec == "shapes" or spec.startswith("shapes:"):
        return _shapes(spec, size, fit)
    if sequences.named(spec):
        return _sequences(spec)
    if spec.startswith(_huggingface.PREFIX):
        return _hugging_face(_huggingface.Source.of(spec), root, size, fit, progress, test_share)
    path = Path(spec).expanduser()
    try:
        if path.is_dir() or is_archive(path):
            return _from_files(path, root, size, fit, progress, test_share)
    except PermissionError as error:
        raise PermissionError(
            f"{shown(error.filename)} may not be read: allow it (chmod), or give a copy that may"
        ) from error
    raise ValueError(_unknown(spec, path))


def loader(dataset: Dataset, spec: str, *, root: str | Path | None = None) -> Callable[[], Dataset]:
    """What loads `dataset` in another process, by `spec`, from the cache that loading it here has
    filled; it makes sure that it is the same."""
    root = Path(root or os.environ.get("TAB_DATA") or "data").resolve()
    how = {"size": dataset.size or IMAGE, "fit": dataset.fit, "test_share": dataset.test_share}
    return partial(_load_same, spec, root, dataset.fingerprint, how)


def _load_same(spec: str, root: Path, fingerprint: str, how: dict) -> Dataset:
    dataset = load_dataset(spec, root=root, download=False, **how)
    if dataset.fingerprint != fingerprint:
        raise ValueError(
            f"{spec} is no longer the data set that this began with ({dataset.fingerprint}, was "
            f"{fingerprint}): put the old one back, or start anew"
        )
    return dataset


def _shapes(spec: str, size: int, fit: str, seed: int = 0) -> Dataset:
    sizes = re.fullmatch(r"shapes(?::(\d+)/(\d+))?", spec)
    if not sizes or any(n and int(n) < len(shapes.CLASSES) for n in sizes.groups()):
        raise ValueError(
            f"{spec!r}: give 'shapes' or 'shapes:TRAIN/TEST' with two numbers of images of at "
            f"least {len(shapes.CLASSES)}, e.g. 'shapes:4000/1000'"
        )
    train, test = (int(n) for n in sizes.groups()) if ":" in spec else (10000, 2000)
    drawn, tested = (shapes.draw(n, seed=seed, stream=i) for i, n in enumerate((train, test)))
    note = f"shapes: synthetic pictures drawn by TAB, not CIFAR-10 ({train:,} train, {test:,} test)"
    return dataset_of(spec, *_sized((shapes.CLASSES, drawn, tested, note), size), fit)


def _sized(read: _cifar.Read, size: int) -> _cifar.Read:
    """Images of 32×32 at another size, and a note that says so."""
    classes, *pairs, note = read
    if size == IMAGE:
        return read
    train, test = ((resized_array(images, size), labels) for images, labels in pairs)
    return classes, train, test, f"{note}; resized to {size}×{size}"


def _sequences(spec: str) -> Dataset:
    task, n, *sizes = sequences.parse(spec)
    train, test = (sequences.draw(task, n, m, stream=i) for i, m in enumerate(sizes))
    note = f"{task}: {n} generated tokens, {train.labels.shape[1]} of them questions"
    note += f" ({sizes[0]:,} sequences to train on, {sizes[1]:,} to test on)"
    classes = tuple(map(str, range(sequences.VALUES)))
    return Dataset(spec, classes, train, test, note, sequences.fingerprint(train, test))


def _cached(
    root: Path,
    name: str,
    key: str,
    size: int,
    fit: str,
    make: Callable[[], Dataset],
    share: float = 0.0,
) -> Dataset:
    """The data set from the cache, if that was made of `key`; else made, and cached."""
    name += "" if size == IMAGE else f"-{size}"
    name += "" if fit == usual_fit(size) else f"-{fit}"
    name += f"-test-{share!r}" if share else ""
    file = root / "cache" / f"{name}.npz"
    if (found := _cache.load(file, key)) is None:
        dataset = make()
        _cache.save(
            file,
            key,
            **{name: getattr(dataset, name) for name in ("name", "classes", "note", "fingerprint")},
            train_images=dataset.train.images.numpy(),
            train_labels=dataset.train.labels.numpy(),
            test_images=dataset.test.images.numpy(),
            test_labels=dataset.test.labels.numpy(),
        )
        return dataset
    arrays = {
        f"{split}_{part}": torch.from_numpy(found[f"{split}_{part}"])
        for split in ("train", "test")
        for part in ("images", "labels")
    }
    return Dataset(
        name=str(found["name"]),
        classes=tuple(found["classes"].tolist()),
        train=Split(arrays["train_images"], arrays["train_labels"]),
        test=Split(arrays["test_images"], arrays["test_labels"]),
        note=str(found["note"]),
        fingerprint=str(found["fingerprint"]),
        fit=fit,
        test_share=share,
    )


def _cifar10(root: Path, download: bool, size: int, fit: str) -> Dataset:
    def make() -> Dataset:
        return dataset_of("cifar10", *_sized(_cifar.official(root, download), size), fit)

    return _cached(root, "cifar10", "cifar10", size, fit, make)


def _hugging_face(
    source: _huggingface.Source,
    root: Path,
    size: int,
    fit: str,
    progress: Progress | None,
    share: float,
) -> Dataset:
    def make() -> Dataset:
        read = _huggingface.read(source, size, fit, progress, share)
        return dataset_of(source.spec, *read, fit, share)

    place = hashlib.sha256(source.spec.encode()).hexdigest()[:8]
    name = f"hf-{shown(Path(source.name).name)[:40]}-{place}"
    return _cached(root, name, source.key(), size, fit, make, share)


def _from_files(
    path: Path, root: Path, size: int, fit: str, progress: Progress | None, share: float
) -> Dataset:
    path = path.resolve()

    def make() -> Dataset:
        tree = open_tree(path)
        kind, base = _located(tree)
        if kind == "pictures":
            read = _pictures.read(tree, base, _cifar.CLASSES, size, fit, progress, share)
        else:
            check_share(share, True, shown(path))
            read = _sized(_cifar.read(tree, kind, base), size)
        return dataset_of(f"folder:{shown(path.name)}", *read, fit, share)

    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return _cached(root, f"{shown(path.name)[:40]}-{place}", _key(path), size, fit, make, share)


def _key(path: Path) -> str:
    """Another string as soon as a file of the set comes, goes or changes."""
    if path.is_file():
        return stamp(path)
    tree = Folder(path)
    kind, base = _located(tree)
    if kind == "pictures":
        return _pictures.key(tree, base)
    files = sorted(name for name, what in tree.list(base).items() if what == FILE)
    return "\n".join(f"{name} {stamp(path / base / name)}" for name in files)


def _located(tree: Folder | Archive) -> tuple[str, str]:
    if found := locate(tree, KINDS):
        return found
    if (base := _pictures.locate_unsplit(tree)) is not None:
        return "pictures", base
    raise ValueError(_pictures.nothing(tree))


def _unknown(spec: str, path: Path) -> str:
    if path.is_file():
        return (
            f"{shown(spec)} is no whole tar archive or zip archive (nor a folder), fetch it again; "
            f"{_pictures.LAYOUT}"
        )
    known = [*NAMED]
    if path.parent.is_dir():
        beside = [name for name in os.listdir(path.parent) if name[0] != "."]
        near = difflib.get_close_matches(path.name, beside)  # not by the folders that they share
        known += [str(path.parent / name) for name in near]
    choose = (
        "choose cifar10, shapes, shapes:TRAIN/TEST, recall, copy, needle, hf:NAME, or an existing "
        "folder or archive (tar, zip) with train/<class>/* and test/<class>/*, or <class>/*"
    )
    return unknown(spec, known, choose, what="data set ")
