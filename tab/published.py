"""The figures of the published study, of which published.csv is the only copy."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

EPOCHS = 100  # of each of its runs, on CIFAR-10
NEAR = 0.015  # of test accuracy: what counts here as the same figure


class Figure(NamedTuple):
    """One run; accuracies of the last epoch, in 0…1."""

    test_accuracy: float
    train_accuracy: float
    train_seconds: float


@functools.cache
def figures() -> dict[tuple[str, str], Figure]:
    """(model, attention) -> its figure; the mechanisms in the study's order."""
    with (Path(__file__).parent / "published.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return {
        (line.pop("model"), line.pop("attention")): Figure(**{k: float(v) for k, v in line.items()})
        for line in lines
    }


def published_attentions() -> list[str]:
    return list(dict.fromkeys(attention for _, attention in figures()))
