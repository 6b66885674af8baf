"""CIFAR-10 (Krizhevsky 2009) by torchvision: its download, its MD5 sums, its reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
Pair = tuple[np.ndarray, np.ndarray]  # images uint8 (N, 32, 32, 3), labels int64 (N,)


def read(root: Path, download: bool) -> tuple[Pair, Pair]:
    """(train, test). OSError names the file at fault and the way out."""
    from torchvision.datasets import CIFAR10  # slow to import, and needed once

    try:
        # Compares the MD5 sum of every file before it unpickles any.
        train, test = (CIFAR10(root, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError) as error:
        fetch = "" if download else "Allow the download, or fetch "
        raise OSError(
            f"CIFAR-10 is not whole: {_fault(root, CIFAR10)} ({error}). "
            f"{fetch or 'Fetch '}{CIFAR10.url} where the network allows and put it in {root}; or "
            "use --data shapes (built in), or --data DIR for pictures in folders"
        ) from error
    # torchvision's images are a transposed view of planes.
    return tuple(
        (np.ascontiguousarray(part.data), np.asarray(part.targets, np.int64))
        for part in (train, test)
    )


def _fault(root: Path, source: type) -> str:
    from torchvision.datasets.utils import check_integrity

    for name, md5 in (*source.train_list, *source.test_list):
        file = root / source.base_folder / name
        if not check_integrity(str(file), md5):
            return f"{file} is {'truncated or altered' if file.exists() else 'missing'}"
    return f"the class list in {root / source.base_folder} is missing or altered"
