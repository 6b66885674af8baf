"""The accuracies of the published study by epoch, of which published.csv is the only copy."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

EPOCHS = 100  # of each of its runs, on CIFAR-10
NEAR = 0.015  # of test accuracy: what counts here as the same figure


class Curve(NamedTuple):
    """One run; accuracies in 0…1 after epoch 1 … EPOCHS, of which its tables show the last."""

    test: tuple[float, ...]
    train: tuple[float, ...]


@functools.cache
def curves() -> dict[tuple[str, str], Curve]:
    """(model, attention) -> its run; the mechanisms in the study's order."""
    with (Path(__file__).parent / "published.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        pair = float(line["test_accuracy"]), float(line["train_accuracy"])
        found.setdefault((line["model"], line["attention"]), []).append(pair)
    return {key: Curve(*zip(*pairs, strict=True)) for key, pairs in found.items()}


def published_attentions() -> list[str]:
    """The mechanisms of the study, in its order."""
    return list(dict.fromkeys(attention for _, attention in curves()))
