"""Comparisons of several rows with one control, of which none may be wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from .difference import Sample
from .estimate import LEVEL, least_p

NOISIER = 3.0  # rows' seed variance over the control's for which Dunnett's correlation is taken


@dataclass(frozen=True)
class Family:
    """Comparisons of which none may be wrong: k rows with one control, by Dunnett (1955).

    shared: for each row the correlation's root with the control's mean. Rows are compared with the
    same control, so that their differences correlate; normal quantiles give the level at which each
    may be tested, and each part of its variance brings its own degrees of freedom.
    """

    shared: tuple[float, ...]

    @classmethod
    def of(cls, rows: Iterable[Sample], control: Sample) -> Family:
        """Correlations by the numbers of seeds, for rows that vary NOISIER times as much as the
        control: the least that were seen, as smaller ones never make an interval too narrow. Rows
        of a single seed are not tested, and do not count."""
        counts = [len(row.seeds) for row in rows if len(row.seeds) > 1]
        ratios = (NOISIER * len(control.seeds) / count for count in counts)
        return cls(tuple(math.sqrt(1 / (1 + ratio)) for ratio in ratios))

    def adjusted(self, p: float) -> float:
        """The probability that any of the comparisons has a p so small; NaN stays."""
        k = len(self.shared)
        if math.isnan(p) or k < 2:
            return p
        if k * p < 1e-9:  # of which there is nothing to see in 1 − a probability near 1
            return k * p
        x, weights = _hermite()
        shared = np.array(self.shared)[:, None]
        c, rest = -ndtri(p / 2), np.sqrt(1 - shared**2)
        inside = ndtr((c - shared * x) / rest) - ndtr((-c - shared * x) / rest)  # (k, nodes)
        none = float(np.prod(inside, 0) @ weights)
        return max(p, min(k * p, 1 - none))

    def alpha(self, error: float = 1 - LEVEL) -> float:
        """At which each comparison may be tested so that any is wrong with probability `error`."""
        return _alpha(self.shared, error)


@functools.lru_cache(maxsize=256)
def _alpha(shared: tuple[float, ...], error: float) -> float:
    family = Family(shared)
    return error if len(shared) < 2 else least_p(lambda alpha: family.adjusted(alpha) >= error)


@functools.cache
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    return x, weights / weights.sum()
