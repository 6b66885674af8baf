"""robustness.json: the sections in which a run's robustness is kept.

Each is written when it is done and measured again only under other settings. It also holds
what it was measured on: the data set's fingerprint, how many images, the official files' sum, and
the sum of the weights.

    noise             accuracy against Gaussian noise on the input
    calibration       expected calibration error
    mirrored          accuracy from the mean logits of each test image and its mirror image
    attacks           FGSM, PGD and the signs of masked gradients (tab/analysis/attacks.py)
    pgd               accuracy under PGD at ε = 0.25/255 … 8/255, with each image's answer
    autoattack        the same under AutoAttack at 1/255 and 8/255, where asked for
    cache             of multi_head: accuracy against the budget of H2O's cache and its controls'
    own/<kind>        accuracy at severity 1 … 5 of our own corruptions, not CIFAR-10-C
    cifar10c/<name>   the same on the official arrays
    cifar10.1         accuracy on the new test set
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from ..files.formats import check, read_json, reading

FILE = "robustness.json"
LATER = ("data", "images", "model")  # settings that older files do not state


class Curve(TypedDict):
    """Test accuracy at each level."""

    accuracy: list[float]


class Calibration(TypedDict):
    """The expected calibration error."""

    ece: float


class Attacks(TypedDict):
    """Accuracies under attack, and signs that gradients are masked."""

    fgsm: float
    pgd: float
    random: float
    images: int
    suspicions: list[str]


class Answered(TypedDict):
    """Accuracy at each level, and which images were right."""

    accuracy: list[float]
    right: list[str]
    images: int


class Cache(TypedDict):
    """Accuracy with an H2O cache of each size, by what it keeps."""

    accuracy: list[float]
    recent: list[float]
    random: list[float]
    images: int


class One(TypedDict):
    """One accuracy: on a new test set, or on mirrored copies, too."""

    accuracy: float


KINDS = {  # else a Curve
    "calibration": Calibration,
    "attacks": Attacks,
    "pgd": Answered,
    "autoattack": Answered,
    "cache": Cache,
    "mirrored": One,
    "cifar10.1": One,
}


def read(run: Path) -> dict:
    """robustness.json as it is, {} if there is none."""
    path = run / FILE
    if not path.exists():
        return {}
    way_out = "remove it, and measure again"
    found = read_json(path, dict, way_out)
    with reading(path, way_out):
        for name, section in found.items():
            check(name, section, KINDS.get(name, Curve))
            check(f"{name}: settings", section.setdefault("settings", {}), dict)
    return found


def differing(settings: dict, other: dict) -> list[str]:
    """The keys in which two measurements differ. Older ones do not state LATER: they were made on
    the data of their run."""
    unstated = {key for key in LATER if key not in settings or key not in other}
    keys = dict.fromkeys((*settings, *other))
    return [k for k in keys if k not in unstated and settings.get(k) != other.get(k)]
