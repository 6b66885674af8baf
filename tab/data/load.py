"""Image sets in memory: CIFAR-10, a folder or archive of pictures, or the built-in `shapes`.

Everything is uint8 (N, 32, 32, 3) in RGB. What took time to read is cached under the data root:
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

import torch
from torch import Tensor

from ..tasks.tasks import Shared
from . import cache as _cache
from . import cifar as _cifar
from . import pictures as _pictures
from . import sequences, shapes
from .dataset import Dataset, Split, dataset_of
from .tree import FILE, Archive, Folder, is_archive, locate, open_tree, shown, stamp

__all__ = ["Dataset", "Split", "describe", "hold_out", "load_dataset", "share", "statistics"]

SIDE = 32
NAMED = ("cifar10", "shapes", *sequences.TASKS)  # sets that are no files of the user
Progress = Callable[[int, int, str], None]  # (done, total, what)
# What a folder or archive can hold, and what tells it by the entries of a folder.
KINDS = {"pictures": _pictures.is_set, **_cifar.KINDS}


def load_dataset(
    spec: str = "cifar10",
    *,
    root: str | Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Dataset:
    """The data set that `spec` names.

    "cifar10": the official files, fetched and checksummed by torchvision (download=False: only if
    already there). "shapes" or "shapes:TRAIN/TEST": drawn, with these numbers of images. "recall",
    "copy", "needle", or with sizes "recall:256:20000/2000": sequences of tokens (sequences.py). A
    folder, or an archive of one (.zip, .tar, .tar.gz, .tar.xz, .tar.bz2), at whatever depth:
    pictures train/<class>/*, test/<class>/* (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM; stretched to
    32×32), or the official Python files of CIFAR-10 or CIFAR-100; read in memory, never unpacked to
    disk.
    ValueError or OSError name the file at fault and the way out.
    """
    root = Path(root or os.environ.get("TAB_DATA") or "data")
    spec = str(spec)
    if spec == "cifar10":
        return _cifar10(root, download)
    if spec == "shapes" or spec.startswith("shapes:"):
        return _shapes(spec)
    if sequences.named(spec):
        return _sequences(spec)
    path = Path(spec).expanduser()
    try:
        if path.is_dir() or is_archive(path):
            return _from_files(path, root, progress)
    except PermissionError as error:
        raise PermissionError(
            f"{shown(error.filename)} may not be read: allow it (chmod), or give a copy that may"
        ) from error
    raise ValueError(_unknown(spec, path))


def share(dataset: Dataset, spec: str, *, root: str | Path | None = None) -> Shared[Dataset]:
    """`dataset` for tasks of an executor: another process loads it by `spec`, from the cache that
    loading it here has filled, and makes sure that it is the same."""
    root = Path(root or os.environ.get("TAB_DATA") or "data").resolve()
    shared = Shared(dataset.fingerprint, partial(_load_same, spec, root, dataset.fingerprint))
    shared.put(dataset)
    return shared


def _load_same(spec: str, root: Path, fingerprint: str) -> Dataset:
    dataset = load_dataset(spec, root=root, download=False)
    if dataset.fingerprint != fingerprint:
        raise ValueError(
            f"{spec} is no longer the data set that this began with ({dataset.fingerprint}, was "
            f"{fingerprint}): put the old one back, or start anew"
        )
    return dataset


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std), float64 (3,) in 0…255 units, of images uint8 (N, H, W, 3); std is population.

    From the histogram of each channel, so that no sum can lose digits: a float32 sum over
    51 million pixels does.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(
            f"statistics wants uint8 (N ≥ 1, H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
    value = torch.arange(256, dtype=torch.float64)
    mean, std = torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    for c in range(3):
        weight = torch.bincount(images[..., c].flatten(), minlength=256).double().cpu()
        weight /= weight.sum()
        mean[c] = (weight * value).sum()
        std[c] = (weight * (value - mean[c]) ** 2).sum().sqrt()
    return mean, std


def hold_out(
    labels: Tensor, count: int, *, seed: int, least: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """(train, validation): sorted int64 indices; validation holds `count`, each class its share.

    Shares are count·n_c/N rounded down; the remainder goes to the largest fractions, lower class
    first. least: images of each class that train and validation have at least; a class with fewer
    has all of its own there. ValueError if `count` leaves no room for that.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
    if not 0 < count < len(labels):
        raise ValueError(f"cannot hold out {count} of {len(labels)} images: give 1…N−1")
    sizes = torch.bincount(labels)  # (classes,)
    low, high = sizes.clamp(max=least[1]), sizes - sizes.clamp(max=least[0])
    if (low > high).any() or not low.sum() <= count <= high.sum():
        raise ValueError(
            f"cannot hold out {count} of {len(labels)} images of {int((sizes > 0).sum())} classes "
            f"and keep {least[0]} of each, and hold out {least[1]}: give "
            f"{int(low.sum())}…{int(high.sum())}"
        )
    shares = _shares(sizes, count, low, high)
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = (labels == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _shares(sizes: Tensor, count: int, low: Tensor, high: Tensor) -> Tensor:
    """int64 (classes,), low ≤ share ≤ high, `count` in all, as near to the sizes as can be."""
    total = int(sizes.sum())
    shares = (sizes * count // total).clamp(low, high)
    while left := count - int(shares.sum()):
        step = 1 if left > 0 else -1
        owed = (sizes * count - shares * total) * step  # in 1/total of an image
        room = shares < high if step > 0 else shares > low
        most = torch.argsort(owed.masked_fill(~room, -(2**62)), descending=True, stable=True)
        shares[most[: min(abs(left), int(room.sum()))]] += step
    return shares


def describe(dataset: Dataset) -> list[tuple[str, str]]:
    """(what, value) rows for a table: counts, statistics, size, note, fingerprint."""
    train, test = dataset.train, dataset.test
    if dataset.sequences:
        return [
            ("name", dataset.name),
            ("note", dataset.note),
            ("sequences", f"{len(train):,} train, {len(test):,} test"),
            ("tokens", f"{train.tokens.shape[1]}, each a key and a value"),
            ("questions", f"{train.labels.shape[1]} in each, {len(dataset.classes)} answers"),
            ("fingerprint", dataset.fingerprint),
        ]
    mean, std = statistics(train.images)
    counts = (torch.bincount(s.labels, minlength=len(dataset.classes)) for s in (train, test))
    size = sum(s.images.numel() for s in (train, test)) / 2**20
    return [
        ("name", dataset.name),
        ("note", dataset.note),
        ("images", f"{len(train):,} train, {len(test):,} test, {size:,.1f} MiB as uint8"),
        *(
            (f"class {i} {name}", f"{a:,} train, {b:,} test")
            for i, (name, a, b) in enumerate(zip(dataset.classes, *counts, strict=True))
        ),
        ("train mean", " ".join(f"{x:.4f}" for x in mean.tolist()) + "  (RGB, of 0…255)"),
        ("train std", " ".join(f"{x:.4f}" for x in std.tolist())),
        ("fingerprint", dataset.fingerprint),
    ]


def _shapes(spec: str, seed: int = 0) -> Dataset:
    sizes = re.fullmatch(r"shapes(?::(\d+)/(\d+))?", spec)
    if not sizes or any(n and int(n) < len(shapes.CLASSES) for n in sizes.groups()):
        raise ValueError(
            f"{spec!r}: give 'shapes' or 'shapes:TRAIN/TEST' with two numbers of images of at "
            f"least {len(shapes.CLASSES)}, e.g. 'shapes:4000/1000'"
        )
    train, test = (int(n) for n in sizes.groups()) if ":" in spec else (10000, 2000)
    return dataset_of(
        spec,
        shapes.CLASSES,
        shapes.draw(train, seed=seed, stream=0),
        shapes.draw(test, seed=seed, stream=1),
        f"shapes: synthetic pictures drawn by TAB, not CIFAR-10 ({train:,} train, {test:,} test)",
    )


def _sequences(spec: str) -> Dataset:
    task, n, *sizes = sequences.parse(spec)
    train, test = (sequences.draw(task, n, m, stream=i) for i, m in enumerate(sizes))
    note = f"{task}: {n} generated tokens, {train.labels.shape[1]} of them questions"
    note += f" ({sizes[0]:,} sequences to train on, {sizes[1]:,} to test on)"
    classes = tuple(map(str, range(sequences.VALUES)))
    return Dataset(spec, classes, train, test, note, sequences.fingerprint(train, test))


def _cached(file: Path, key: str, make: Callable[[], Dataset]) -> Dataset:
    """The data set from the cache, if that was made of `key`; else made, and cached."""
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
    )


def _cifar10(root: Path, download: bool) -> Dataset:
    def make() -> Dataset:
        return dataset_of("cifar10", *_cifar.official(root, download))

    return _cached(root / "cache" / "cifar10.npz", "cifar10", make)


def _from_files(path: Path, root: Path, progress: Progress | None) -> Dataset:
    path = path.resolve()

    def make() -> Dataset:
        tree = open_tree(path)
        kind, base = _located(tree)
        if kind == "pictures":
            read = _pictures.read(tree, base, _cifar.CLASSES, SIDE, progress)
        else:
            read = _cifar.read(tree, kind, base)
        return dataset_of(f"folder:{shown(path.name)}", *read)

    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    file = root / "cache" / f"{shown(path.name)[:40]}-{place}.npz"
    return _cached(file, _key(path), make)


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
    raise ValueError(_pictures.nothing(tree))


def _unknown(spec: str, path: Path) -> str:
    if path.is_file():
        return (
            f"{shown(spec)} is no whole tar archive or zip archive (nor a folder), fetch it again; "
            f"{_pictures.LAYOUT}"
        )
    known = [*NAMED]
    if path.parent.is_dir():
        known += [str(path.parent / entry.name) for entry in os.scandir(path.parent)]
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"no data set {spec!r}{hint} Choose cifar10, shapes, shapes:TRAIN/TEST, recall, copy, "
        "needle, or an existing folder or archive (tar, zip) with train/<class>/* and "
        "test/<class>/*"
    )
