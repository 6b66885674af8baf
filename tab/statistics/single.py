"""Tests that are not of seeds: one of trained models on images, and a correction of p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr  # scipy.stats takes longer to import


def mcnemar_p(right: np.ndarray, control: np.ndarray) -> float:
    """McNemar's exact mid-p test (Fagerland et al. 2013) of two (S, N) tables of right answers.

    It says whether these trained models differ on images like these, nothing of other seeds, and no
    verdict rests on it. Pooled over seeds with the image as unit: an image speaks for the side
    which more seeds answer rightly, and not at all if as many do. Seeds that share their images are
    thus not counted as if each had images of its own.
    """
    sums = np.sign(right.sum(0) - control.sum(0))  # (N,)
    for_it, against = int((sums > 0).sum()), int((sums < 0).sum())
    if for_it == against:
        return 1.0
    few, both = min(for_it, against), for_it + against
    below = bdtr(few - 1, both, 0.5) if few else 0.0
    return float(below + bdtr(few, both, 0.5))  # 2·(P(X < few) + P(X = few)/2)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: p ≤ α in them keeps the chance of any false one below α.
    A NaN is no test: it stays, and does not count."""
    adjusted, least = [math.nan] * len(ps), 0.0
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = least
    return adjusted
