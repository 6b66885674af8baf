"""Which images are held out, to validate or to test on: a choice by class, drawn from a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Pair = tuple[np.ndarray, np.ndarray]  # images uint8 (N, side, side, 3), labels int64 (N,)
HOW = "--set data.test_share=0.2 to draw a fifth of each class to test on"


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


def check_share(share: float, has_test: bool, where: str, choose: str = "") -> None:
    """A ValueError unless just one thing says what is tested on: the set, or data.test_share.
    choose: what else can be done about a set that says nothing."""
    if not 0 <= share <= 0.9:
        raise ValueError(f"test_share = {share!r}: give a share from 0 to 0.9")
    if has_test and share:
        raise ValueError(
            f"{where} has test images of its own, and data.test_share = {share}: leave that out"
        )
    if not has_test and not share:
        raise ValueError(f"{where} has nothing to test on: give {HOW}{choose}")


def draw_test(images: np.ndarray, labels: np.ndarray, share: float, where: str):
    """(train, test, note): the share of each class, and one image at least, to test on. It is the
    same for all models and seeds. A ValueError: a class has a single image."""
    sizes = np.bincount(labels)
    classes, total = int((sizes > 0).sum()), len(labels)
    if (sizes == 1).any():
        raise ValueError(
            f"{where}: {int((sizes == 1).sum())} of {classes} classes have a single image, which "
            "cannot be in train and in test: add images, or remove the class"
        )
    count = min(max(round(total * share), classes), total - classes)
    chosen = hold_out(torch.from_numpy(labels), count, seed=0, least=(1, 1))
    train, test = ((images[i], labels[i]) for i in (index.numpy() for index in chosen))
    note = f"; of its {total:,} images {count:,} were drawn to test on (data.test_share = {share})"
    return train, test, note


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
