"""Which images are held out: a choice by class, drawn from a seed."""

from __future__ import annotations

import torch
from torch import Tensor


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
