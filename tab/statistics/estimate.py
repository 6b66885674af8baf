"""A number with the parts of its variance; one interval and one p follow from both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # scipy.stats takes longer to import

LEVEL = 0.95  # of every interval; a family of them holds all its truths with this probability
MARGIN = 0.005  # ±0.5 points of accuracy count as equal


@dataclass(frozen=True)
class Part:
    """A part of a variance, and the degrees of freedom it was estimated with."""

    variance: float
    degrees: float


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means, and what its variance adds up from. No parts: not known."""

    value: float
    parts: tuple[Part, ...] = ()

    @property
    def known(self) -> bool:
        """Seeds that do not vary, on images that nobody kept, say nothing of how others would."""
        return sum(part.variance for part in self.parts) > 0

    def half(self, alpha: float) -> float:
        """Half the width of the interval of level 1 − alpha: √(Σ t²·v), t the 1 − alpha/2 quantile
        of Student's distribution with the degrees of freedom of the part v.

        It covers at 1 − alpha or more for normal data, whatever the true sizes of the parts
        (Banerjee 1960). Satterthwaite's single t, for the sum of the parts, does not with two or
        three seeds: where those happen to agree, it takes their part for small and well known.
        """
        return math.sqrt(sum(stdtrit(p.degrees, alpha / 2) ** 2 * p.variance for p in self.parts))

    def interval(self, alpha: float = 1 - LEVEL) -> tuple[float, float] | None:
        """value ± half; None where the variance is not known."""
        if not self.known:
            return None
        half = self.half(alpha)
        return self.value - half, self.value + half

    def p(self, distance: float | None = None) -> float:
        """The least alpha whose interval is no wider than `distance` to each side: |value| gives
        the two-sided p of no difference. NaN where the variance is not known."""
        distance = abs(self.value) if distance is None else distance
        if not self.known:
            return math.nan
        return least_p(lambda alpha: self.half(alpha) <= distance) if distance > 0 else 1.0


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """mean ± t_{S−1}·s/√S; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean = Estimate(float(np.mean(values)), (of_a_mean(values),))
    half = mean.half(1 - LEVEL)
    return mean.value - half, mean.value + half


def least_p(reached: Callable[[float], bool]) -> float:
    """The least p ≤ 1 for which `reached` holds, which it does from there on; 1e-30 is nothing."""
    low, high = math.log(1e-30), 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(math.exp(middle)) else (middle, high)
    return math.exp(high)


def spread(values: Sequence[float]) -> Part:
    """The variance of one of them; exactly 0 where they differ by rounding alone."""
    variance = float(np.var(values, ddof=1))
    return Part(variance if variance > 1e-24 else 0.0, len(values) - 1)


def of_a_mean(values: Sequence[float]) -> Part:
    """The variance of their mean."""
    one = spread(values)
    return Part(one.variance / len(values), one.degrees)
