"""What a data set holds, in numbers: means and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import Dataset


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
