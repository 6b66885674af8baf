"""The table of `tab robustness`: a line for each trained model."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from rich.table import Table

from ..analysis.attacks import EPSILON
from .answer import table

Found = dict[str, dict]  # robustness.json: section -> what was measured
HIDDEN = ("settings", "right")  # the latter: each image's answer


def _corrupted(found: Found) -> float | None:
    """The mean over kinds and severities, of the official images where they were given."""
    for kind in ("cifar10c/", "own/"):
        if curves := [x["accuracy"] for name, x in found.items() if name.startswith(kind)]:
            return statistics.mean(map(statistics.mean, curves))
    return None


def _of(section: str, key: str, at: int | None = None) -> Callable[[Found], float | None]:
    def read(found: Found) -> float | None:
        value = found.get(section, {}).get(key)
        return value if value is None or at is None else value[at]

    return read


COLUMNS: dict[str, Callable[[Found], float | None]] = {
    "Clean": _of("noise", "accuracy", 0),
    "Mirrored too": _of("mirrored", "accuracy"),
    "Noise": _of("noise", "accuracy", -1),
    "Corrupted": _corrupted,
    "FGSM": _of("attacks", "fgsm"),
    "PGD": _of("attacks", "pgd"),
    "AutoAttack": _of("autoattack", "accuracy", -1),
    "CIFAR-10.1": _of("cifar10.1", "accuracy"),
    "ECE": _of("calibration", "ece"),
}


def robustness_table(runs: dict[str, Found]) -> Table:
    """Accuracies in per cent, and the calibration error; what nothing fills is left out."""
    shown = {
        head: read
        for head, read in COLUMNS.items()
        if any(read(found) is not None for found in runs.values())
    }
    note = (
        "In per cent. Mirrored too: mean logits of an image and its mirror image. "
        "Noise: σ = 1 standard deviation of the images. Corrupted: mean over kinds "
        f"and severities. FGSM, PGD: attacks of ε = {255 * EPSILON:g}/255. ECE: calibration error."
    )
    for name, found in runs.items():
        if signs := found.get("attacks", {}).get("suspicions"):
            note += f"\n{name}: gradients may be masked ({'; '.join(signs)})."
    made = table("Robustness", "Run", *shown, right=[*shown], note=note)
    for name, found in runs.items():
        values = (read(found) for read in shown.values())
        made.add_row(name, *("–" if x is None else f"{100 * x:.1f}" for x in values))
    return made


def summaries(runs: dict[str, Found]) -> dict[str, Found]:
    """For --json: all that was measured, but for each image's answer."""
    return {
        name: {
            section: {k: x for k, x in values.items() if k not in HIDDEN}
            for section, values in found.items()
        }
        for name, found in runs.items()
    }
