"""What an image set is in memory: uint8 (N, S, S, 3) in RGB, labels, class names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..run_config import Data
from .sequences import SequenceSplit
from .statistics import statistics


@dataclass(frozen=True)
class Split:
    """images uint8 (N, S, S, 3), labels int64 (N,)."""

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
        if len(labels) and labels.min() < 0:
            raise ValueError(f"labels are the numbers of classes, from 0; got {int(labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `note` says what it is and is shown beside every result."""

    name: str
    classes: tuple[str, ...]
    train: Any  # a Split, or a SequenceSplit: `sequences` says which
    test: Any
    note: str
    fingerprint: str  # of all images, labels and class names
    fit: str = "stretch"  # how pictures became squares (data.fit)
    test_share: float = 0.0  # of its images, drawn to test on (data.test_share)

    @property
    def sequences(self) -> bool:
        """Whether it is one of sequences of tokens, and not of images."""
        return isinstance(self.train, SequenceSplit)

    @property
    def size(self) -> int:
        """Rows and columns of an image (data.size); 0 of sequences."""
        return 0 if self.sequences else self.train.images.shape[1]

    def fitting(self, data: Data, batch_size: int) -> dict[str, object]:
        """What of a recipe has to be another for a set as small as this one: its keys, and values
        that leave something to train on, eight batches of an epoch if there are so many images."""
        count, held = len(self.train), data.validation
        most = count - (1 if self.sequences else len(self.classes))
        found: dict[str, object] = {}
        if not most:
            found, held = {"data.validation": 0, "evaluate.split": "test"}, 0
        elif held > most:
            held = found["data.validation"] = max(1, min(most, count // 10))
        left = min(data.images or count, count - held)
        if data.drop_last and left < batch_size:
            found["train.batch_size"] = max(2, 2 ** ((left // 8).bit_length() - 1))
        return found

    def facts(self) -> list[tuple[str, str]]:
        """(what, value) rows for a table: counts, statistics, size, note, fingerprint."""
        train, test = self.train, self.test
        if self.sequences:
            return [
                ("name", self.name),
                ("note", self.note),
                ("sequences", f"{len(train):,} train, {len(test):,} test"),
                ("tokens", f"{train.tokens.shape[1]}, each a key and a value"),
                ("questions", f"{train.labels.shape[1]} in each, {len(self.classes)} answers"),
                ("fingerprint", self.fingerprint),
            ]
        mean, std = statistics(train.images)
        counts = (torch.bincount(s.labels, minlength=len(self.classes)) for s in (train, test))
        size = sum(s.images.numel() for s in (train, test)) / 2**20
        return [
            ("name", self.name),
            ("note", self.note),
            ("images", f"{len(train):,} train, {len(test):,} test, {size:,.1f} MiB as uint8"),
            *(
                (f"class {i} {name}", f"{a:,} train, {b:,} test")
                for i, (name, a, b) in enumerate(zip(self.classes, *counts, strict=True))
            ),
            ("train mean", " ".join(f"{x:.4f}" for x in mean.tolist()) + "  (RGB, of 0…255)"),
            ("train std", " ".join(f"{x:.4f}" for x in std.tolist())),
            ("fingerprint", self.fingerprint),
        ]

    def __post_init__(self):
        for name, split in (("train", self.train), ("test", self.test)):
            counts = torch.bincount(split.labels.flatten(), minlength=len(self.classes)).tolist()
            if len(counts) > len(self.classes):
                raise ValueError(
                    f"{self.name}, {name}: label {len(counts) - 1}, but there are only "
                    f"{len(self.classes)} classes: {', '.join(self.classes)}"
                )
            if 0 in counts and not self.sequences:  # few sequences may miss an answer
                raise ValueError(
                    f"{self.name}, {name}: no image of class {self.classes[counts.index(0)]!r}; "
                    "each class needs at least one in train and in test"
                )


def dataset_of(
    name: str, classes, train, test, note: str, fit: str = "stretch", share: float = 0.0
) -> Dataset:
    """From numpy pairs (images, labels)."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for array in (*train, *test):
        digest.update(repr(array.shape).encode())
        digest.update(array.data)
    first, second = (
        Split(torch.from_numpy(images), torch.from_numpy(labels))
        for images, labels in (train, test)
    )
    return Dataset(name, tuple(classes), first, second, note, digest.hexdigest()[:16], fit, share)
