"""Image sets in memory: CIFAR-10, a folder or archive of pictures, or the built-in `shapes`.

Everything is uint8 (N, 32, 32, 3) in RGB. What took time to read is cached as one .npz file without
pickles under the data root: `root`, else $TAB_DATA, else ./data. A .npz carries checksums, so an
altered cache is noticed.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import _pictures, shapes

CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
SIDE = 32
Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True)
class Split:
    """images uint8 (N, 32, 32, 3), labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            raise ValueError(
                f"images must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(images)},), one for each image; "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `note` says what it is and is shown beside every result."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    note: str
    fingerprint: str  # of all images, labels and class names

    def __post_init__(self):
        for name, split in (("train", self.train), ("test", self.test)):
            counts = torch.bincount(split.labels, minlength=len(self.classes)).tolist()
            if len(counts) > len(self.classes):
                raise ValueError(
                    f"{self.name}, {name}: label {len(counts) - 1}, but there are only "
                    f"{len(self.classes)} classes: {', '.join(self.classes)}"
                )
            if 0 in counts:
                raise ValueError(
                    f"{self.name}, {name}: no image of class {self.classes[counts.index(0)]!r}; "
                    "each class needs at least one in train and in test"
                )


def load_dataset(
    spec: str = "cifar10",
    *,
    root: str | Path | None = None,
    download: bool = True,
    progress: Progress | None = None,
) -> Dataset:
    """The data set that `spec` names.

    "cifar10": the official files, fetched and checksummed by torchvision (download=False: only if
    already there). "shapes" or "shapes:TRAIN/TEST": drawn, with these numbers of images. A folder or
    a .tar archive of it (.tar.gz, .tar.xz, …): pictures train/<class>/* and test/<class>/*, JPEG or
    PNG, stretched to 32×32. ValueError or OSError name the file at fault and the way out.
    """
    root = Path(root or os.environ.get("TAB_DATA") or "data")
    spec = str(spec)
    if spec == "cifar10":
        return _cifar10(root, download)
    if spec == "shapes" or spec.startswith("shapes:"):
        return _shapes(spec)
    path = Path(spec).expanduser()
    if path.is_dir() or (path.is_file() and tarfile.is_tarfile(path)):
        return _from_pictures(path, root, progress)
    raise ValueError(_unknown(spec, path))


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


def hold_out(labels: Tensor, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """(train, validation): sorted int64 indices; validation holds `count`, each class its share.

    Shares are count·n_c/N rounded down; the remainder goes to the largest fractions, lower class
    first.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise ValueError(f"labels must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}")
    if not 0 < count < len(labels):
        raise ValueError(f"cannot hold out {count} of {len(labels)} images: give 1…N−1")
    sizes = torch.bincount(labels)  # (classes,)
    shares = sizes * count // len(labels)
    fractions = sizes * count % len(labels)
    most = torch.argsort(fractions, descending=True, stable=True)
    shares[most[: count - int(shares.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = (labels == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def describe(dataset: Dataset) -> list[tuple[str, str]]:
    """(what, value) rows for a table: counts, statistics, size, note, fingerprint."""
    train, test = dataset.train, dataset.test
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


def _dataset(name: str, classes, train, test, note: str) -> Dataset:
    """From numpy pairs (images, labels)."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for array in (*train, *test):
        digest.update(repr(array.shape).encode())
        digest.update(array.data)
    splits = (Split(*map(torch.from_numpy, pair)) for pair in (train, test))
    return Dataset(name, tuple(classes), *splits, note, digest.hexdigest()[:16])


def _shapes(spec: str, seed: int = 0) -> Dataset:
    sizes = re.fullmatch(r"shapes(?::(\d+)/(\d+))?", spec)
    if not sizes or any(n and int(n) < len(shapes.CLASSES) for n in sizes.groups()):
        raise ValueError(
            f"{spec!r}: give 'shapes' or 'shapes:TRAIN/TEST' with two numbers of images of at "
            f"least {len(shapes.CLASSES)}, e.g. 'shapes:4000/1000'"
        )
    train, test = (int(n) if n else default for n, default in zip(sizes.groups(), (10000, 2000)))
    return _dataset(
        spec,
        shapes.CLASSES,
        shapes.draw(train, seed=seed, stream=0),
        shapes.draw(test, seed=seed, stream=1),
        f"shapes: synthetic pictures drawn by TAB, not CIFAR-10 ({train:,} train, {test:,} test)",
    )


def _cifar10(root: Path, download: bool) -> Dataset:
    file, key = root / "cache" / "cifar10.npz", "cifar10"
    if (cached := _from_cache(file, key)) is not None:
        return cached
    from torchvision.datasets import CIFAR10  # slow to import, and needed once

    way_out = "use --data shapes (built in), or --data DIR for pictures of your own"
    try:
        # Checks the MD5 sum of every file before it unpickles any.
        train, test = (CIFAR10(root, train=t, download=download) for t in (True, False))
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"CIFAR-10 is not whole in {root / CIFAR10.base_folder}: {_cifar10_fault(root)} "
            f"({error}). Fetch {CIFAR10.url} on a machine that can, and put the file in {root}; "
            f"or {way_out}"
        ) from error
    pairs = ((s.data, np.asarray(s.targets, np.int64)) for s in (train, test))
    note = "CIFAR-10, the official files"
    return _to_cache(_dataset("cifar10", CIFAR10_CLASSES, *pairs, note), file, key)


def _cifar10_fault(root: Path) -> str:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list):
        file = root / CIFAR10.base_folder / name
        if not check_integrity(str(file), md5):
            return f"{file} is {'truncated or altered' if file.exists() else 'missing'}"
    return "its class list is missing or altered"


def _from_pictures(path: Path, root: Path, progress: Progress | None) -> Dataset:
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    file = root / "cache" / f"{path.resolve().name}-{place}.npz"
    if path.is_dir():
        key, found = _pictures.listing(path)
    else:
        key = _pictures.archive_key(path)
    if (cached := _from_cache(file, key)) is not None:
        return cached
    if path.is_dir():

        def fetch(name: str) -> bytes:
            return (path / name).read_bytes()
    else:
        found, fetch = _pictures.read_archive(path)
    classes = _pictures.class_names(path, found, CIFAR10_CLASSES)
    names = {
        split: [f"{split}/{c}/{name}" for c in classes for name in sorted(found[f"{split}/{c}"])]
        for split in _pictures.SPLITS
    }
    images, resized = _pictures.decode_all(
        path, names["train"] + names["test"], fetch, SIDE, progress
    )
    labels = [
        np.repeat(np.arange(len(classes)), [len(found[f"{split}/{c}"]) for c in classes])
        for split in _pictures.SPLITS
    ]
    n = len(names["train"])
    note = f"pictures from {path.resolve().name}: {n:,} train, {len(images) - n:,} test"
    if resized:
        note += f", {resized:,} of them resized to {SIDE}×{SIDE}"
    if any(name.lower().endswith((".jpg", ".jpeg")) for part in names.values() for name in part):
        note += "; lossy JPEG: accuracy can differ a little from that on the original pixels"
    dataset = _dataset(
        f"folder:{path.resolve().name}",
        classes,
        (images[:n], labels[0]),
        (images[n:], labels[1]),
        note,
    )
    return _to_cache(dataset, file, key)


def _from_cache(file: Path, key: str) -> Dataset | None:
    """The cached data set, or None where there is none or it was made of other files."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as npz:  # the zip inside carries CRC-32 sums
            if str(npz["key"]) != key:
                return None
            train, test = (
                Split(*(torch.from_numpy(npz[f"{split}_{part}"]) for part in ("images", "labels")))
                for split in ("train", "test")
            )
            name, note, fingerprint = (str(npz[k]) for k in ("name", "note", "fingerprint"))
            return Dataset(name, tuple(npz["classes"].tolist()), train, test, note, fingerprint)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise OSError(
            f"the cache {file} is truncated or altered ({error}); delete it and load again"
        ) from error


def _to_cache(dataset: Dataset, file: Path, key: str) -> Dataset:
    """Writes the cache atomically: a reader sees the whole file or none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez(
                part,
                key=key,
                name=dataset.name,
                note=dataset.note,
                fingerprint=dataset.fingerprint,
                classes=np.array(dataset.classes),
                train_images=dataset.train.images.numpy(),
                train_labels=dataset.train.labels.numpy(),
                test_images=dataset.test.images.numpy(),
                test_labels=dataset.test.labels.numpy(),
            )
            part.flush()
            os.fsync(part.fileno())
        os.replace(part.name, file)
    except OSError as error:
        raise OSError(
            f"cannot write {file} ({error}); set TAB_DATA to a folder that can be written"
        ) from error
    return dataset


def _unknown(spec: str, path: Path) -> str:
    if path.is_file():
        return f"{spec} is a file, but no tar archive of pictures; {_pictures.LAYOUT}"
    known = ["cifar10", "shapes"]
    if path.parent.is_dir():
        known += [str(path.parent / entry.name) for entry in os.scandir(path.parent)]
    near = difflib.get_close_matches(spec, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"no data set {spec!r}{hint} Choose cifar10, shapes, shapes:TRAIN/TEST, or an existing "
        "folder or tar archive with train/<class>/* and test/<class>/*"
    )
