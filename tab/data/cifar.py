"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), the official Python files.

Names, address and MD5 sums are torchvision's. Nothing is unpickled whose sum is not the known one.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .tree import FILE, Archive, Folder, locate, open_tree, shown

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
Pair = tuple[np.ndarray, np.ndarray]  # images uint8 (N, 32, 32, 3), labels int64 (N,)
Read = tuple[tuple[str, ...], Pair, Pair, str]  # classes, train, test, note
# By its name in torchvision.datasets, what tells a folder that holds the data set.
KINDS = {
    "CIFAR10": lambda entries: FILE in (entries.get("data_batch_1"), entries.get("test_batch")),
    "CIFAR100": lambda entries: entries.get("train") == entries.get("test") == FILE,
}
TITLES = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}


def read(tree: Folder | Archive, kind: str, base: str) -> Read:
    """(classes, train, test, note). OSError names the file that is missing or altered."""
    try:
        return _read(tree, kind, base)
    except OSError as error:
        raise OSError(
            f"{TITLES[kind]} is not whole: {error}; unpack {_source(kind).url} again, or give that "
            "archive itself"
        ) from error


def _read(tree: Folder | Archive, kind: str, base: str) -> Read:
    source, here, place = _source(kind), tree.list(base), tree.path / base
    names = [name for name, _ in (*source.train_list, *source.test_list)]
    for name in (*names, source.meta["filename"]):
        if here.get(name) != FILE:
            raise OSError(f"{shown(place / name)} is missing")
    paths = {name: f"{base}/{name}" if base else name for name in (*names, source.meta["filename"])}
    fetch = tree.read(list(paths.values()))

    def load(name: str, md5: str) -> dict:
        data = fetch(paths[name])
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise OSError(f"{shown(place / name)} is truncated or altered")
        return pickle.loads(data, encoding="latin1")

    train, test = (
        _pair([load(*file) for file in part]) for part in (source.train_list, source.test_list)
    )
    classes = load(source.meta["filename"], source.meta["md5"])[source.meta["key"]]
    fine = ", the fine classes" * (kind == "CIFAR100")
    return tuple(classes), train, test, f"{TITLES[kind]}, the official files{fine}"


def official(root: Path, download: bool) -> Read:
    """CIFAR-10 from its folder or archive in `root`; if neither is whole, fetched if `download`."""
    source = _source("CIFAR10")
    try:
        return _kept(root, source)
    except OSError as error:
        fault: Exception = error
        why: Exception = error
    if download:
        from torchvision.datasets.utils import download_url

        try:
            download_url(source.url, root, source.filename, source.tgz_md5)  # unless it is there
            return _kept(root, source)
        except (OSError, RuntimeError) as error:
            why = error
    raise OSError(
        f"CIFAR-10 is not whole: {fault}{'' if why is fault else f' ({why})'}. "
        f"{'Fetch' if download else 'Allow the download, or fetch'} {source.url} where the network "
        f"allows and put it in {shown(root)}; or use --data shapes (built in), or --data DIR for "
        "pictures in folders"
    ) from why


def _kept(root: Path, source: Any) -> Read:
    """From the folder, else from the archive. OSError: what is wrong with the first that exists."""
    fault = None
    for path in (root / source.base_folder, root / source.filename):
        if path.exists():
            try:
                tree = open_tree(path)
                _, base = locate(tree, {"CIFAR10": KINDS["CIFAR10"]}) or ("", "")
                return _read(tree, "CIFAR10", base)
            except (OSError, ValueError) as error:
                fault = fault or error
    missing = f"{shown(root / source.base_folder / source.train_list[0][0])} is missing"
    raise OSError(fault or missing) from fault


def _pair(batches: list[dict]) -> Pair:
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [x for b in batches for x in (b["labels"] if "labels" in b else b["fine_labels"])]
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.asarray(labels, np.int64)


def _source(kind: str) -> Any:
    from torchvision import datasets  # slow to import, and seldom needed

    return getattr(datasets, kind)
