"""The mean of a variant's seeds, and its difference from the control's, each with its variance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .estimate import Estimate, Part, of_a_mean, spread

PAIRED = 0.5  # correlation of two variants' accuracies over seeds for which the weights are best
OWN = 2 / 3  # share of a row's own seed variance in the one it is given; the rest is all rows' mean


@dataclass(frozen=True)
class Sample:
    """The trained models of one variant."""

    seeds: tuple[int, ...]  # (S,)
    accuracy: np.ndarray  # (S,)
    right: np.ndarray | None = None  # (S, N) float32: 1 where the model answers the image rightly
    typical: bool = True  # False: its spread, as of a run that diverged, says nothing of other rows

    @functools.cached_property
    def interaction(self) -> float:
        return _interaction(self.right)


def mean(sample: Sample) -> Estimate:
    """The mean accuracy over seeds, for other seeds and images like these."""
    value = float(sample.accuracy.mean())
    if len(sample.seeds) < 2:
        return Estimate(value)
    parts = [of_a_mean(sample.accuracy)]
    if sample.right is not None:
        within = sample.interaction / len(sample.seeds)
        parts.append(_images(sample.right.mean(0), within))
    return Estimate(value, tuple(parts))


def differences(rows: Sequence[Sample], control: Sample) -> list[Estimate]:
    """Each row's mean accuracy − the control's, with the parts of its variance: seeds, those that
    only one of the two has, and images. No parts with a single seed on either side.

    The seeds' part of a row is OWN of its own and the rest of all rows' mean, with 2kd/(k + 1)
    degrees of freedom for k rows of d each: few seeds hardly know their own spread, and rows do
    differ in theirs. A row that is not typical, or that answers every image as the control does in
    every seed, stands alone.
    """
    found = [_Difference(row, control) for row in rows]
    pooled = [d for d in found if not d.alone]
    pools = {key: [d.spread[key] for d in pooled if key in d.spread] for key in ("both", "row")}
    return [d.estimate({} if d.alone else pools) for d in found]


class _Difference:
    """A row against the control. Seeds that both have are paired; z = a·row − c·control of those.

    The weights a, c of common seeds in the two means minimise the variance of their difference if
    seeds vary alike in both and correlate by PAIRED. Whether they do or not, the difference is
    unbiased and its variance is estimated from the data.
    """

    def __init__(self, row: Sample, control: Sample):
        self.row, self.control = row, control
        common = [s for s in row.seeds if s in control.seeds]
        if len(common) == 1 and len(row.seeds) + len(control.seeds) > 2:
            common = []  # the spread of one pair is not known
        self.common = len(common)
        at = {seed: i for i, seed in enumerate(control.seeds)}
        self.i = [i for i, seed in enumerate(row.seeds) if seed in common]
        self.j = [at[row.seeds[i]] for i in self.i]
        self.extra_row = [i for i in range(len(row.seeds)) if i not in self.i]
        self.extra_control = [j for j in range(len(control.seeds)) if j not in self.j]
        n, a, c = len(common), len(self.extra_row), len(self.extra_control)
        both = (a + n) * (c + n) - PAIRED**2 * a * c
        self.a, self.c = n * (c + n + PAIRED * a) / both, n * (a + n + PAIRED * c) / both
        self.z = self._paired(row.accuracy, control.accuracy)
        self.spread: dict[str, Part] = {}  # variance of one seed, not yet of a mean
        if min(len(row.seeds), len(control.seeds)) > 1:
            if n:
                self.spread["both"] = spread(self.z)
            if a:
                self.spread["row"] = spread(row.accuracy)
            if c:
                self.spread["control"] = spread(control.accuracy)

    @property
    def alone(self) -> bool:
        a, c = self.row.right, self.control.right
        tied = a is not None and c is not None and np.array_equal(a[self.i], c[self.j])
        return not self.row.typical or (tied and self.common == len(self.row.seeds))

    def _paired(self, row: np.ndarray, control: np.ndarray) -> np.ndarray:
        """z of (S,) accuracies or (S, N) answers."""
        return self.a * row[self.i] - self.c * control[self.j]

    def _combined(self, row: np.ndarray, control: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The difference of the weighted means over seeds, () or (N,)."""
        total = z.mean(0) if self.common else np.zeros(row.shape[1:])
        if self.extra_row:
            total = total + (1 - self.a) * row[self.extra_row].mean(0)
        if self.extra_control:
            total = total - (1 - self.c) * control[self.extra_control].mean(0)
        return total

    def _shares(self) -> dict[str, float]:
        """What of the variance of one seed is in the variance of the difference."""
        shares = {"both": 1 / self.common} if self.common else {}
        if self.extra_row:
            shares["row"] = (1 - self.a) ** 2 / len(self.extra_row)
        if self.extra_control:
            shares["control"] = (1 - self.c) ** 2 / len(self.extra_control)
        return shares

    def estimate(self, pools: dict[str, list[Part]]) -> Estimate:
        value = float(self._combined(self.row.accuracy, self.control.accuracy, self.z))
        if not self.spread:
            return Estimate(value)
        parts, shares = [], self._shares()
        for key, part in self.spread.items():
            part = _moderated(part, pools.get(key, []))
            parts.append(Part(shares[key] * part.variance, part.degrees))
        if (a := self.row.right) is not None and (c := self.control.right) is not None:
            z = self._paired(a, c)
            both = {"both": _interaction(z)} if self.common else {}
            alone = {"row": self.row.interaction, "control": self.control.interaction}
            within = sum(share * (both | alone)[key] for key, share in shares.items())
            parts.append(_images(self._combined(a, c, z), within))
        return Estimate(value, tuple(parts))


def _moderated(part: Part, pool: Sequence[Part]) -> Part:
    """OWN of its own variance and the rest of the pool's mean, which it is a part of."""
    degrees = sum(p.degrees for p in pool)
    if degrees <= part.degrees:
        return part
    pooled = sum(p.degrees * p.variance for p in pool) / degrees
    k = degrees / part.degrees
    return Part(OWN * part.variance + (1 - OWN) * pooled, 2 * k * part.degrees / (k + 1))


def _interaction(table: np.ndarray) -> float:
    """MSE/N of a two-way table (S ≥ 2, N ≥ 2) of seeds and images: what varies with both at once,
    in the variance of one seed's mean."""
    (s, n), by_seed, by_image = table.shape, table.mean(1), table.mean(0)
    squares = np.vdot(table, table) / (s * n) + np.mean(by_seed) ** 2
    squares -= np.mean(by_seed**2) + np.mean(by_image**2)
    return s * max(0.0, float(squares)) / ((s - 1) * (n - 1))


def _images(by_image: np.ndarray, within: float) -> Part:
    """What the choice of N test images adds to the variance of a mean: that of `by_image` (N,), its
    means over seeds, − `within`, what of it is the seeds' already; not below 0, + 2/(N + 2)².

    The last as if two more images had spoken, one for each side (Bonett and Price 2012): that two
    models answer N images alike leaves room for a difference of the order of 1/N on others.
    """
    n = len(by_image)
    between = float(by_image.var(ddof=1, dtype=np.float64)) / n
    return Part(max(0.0, between - within) + 2 / (n + 2) ** 2, n - 1)
