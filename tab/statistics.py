"""What differences between trained models are worth: intervals, paired tests, equivalence.

Pure functions of numbers. A variant has S seeds, each scored on the same N test images; right
(S, N) holds 1 where seed s answers image i correctly. Differences pair the seeds of two variants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit  # scipy.stats takes longer to import

LEVEL = 0.95  # of every interval; tests call 1 − LEVEL significant
MARGIN = 0.005  # ±0.5 points of accuracy count as equal
SEEDS = 3  # fewer never show that two are equal
RESAMPLES = 2000


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """mean ± t_{S−1}·s/√S; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), t_quantile(len(values)) * standard_error(values)
    return mean - half, mean + half


def t_quantile(count: int) -> float:
    return float(stdtrit(count - 1, 0.5 + LEVEL / 2))


def standard_error(values: Sequence[float]) -> float:
    """s/√S; exactly 0 where the values differ by rounding alone."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return spread if spread > 1e-12 else 0.0


# --- bootstrap ------------------------------------------------------------------------------------


def resampled_images(right: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """right (K, N) -> (RESAMPLES, K): mean accuracies on N images drawn with replacement.

    All K runs see the same draws, so that differences of columns are paired by image.
    """
    generator, (_, n) = np.random.default_rng(seed), right.shape
    columns = np.ascontiguousarray(right.T, dtype=np.float32)  # (N, K)
    means = np.empty((RESAMPLES, len(right)))
    for row in means:
        counts = np.bincount(generator.integers(n, size=n), minlength=n)  # (N,)
        row[:] = counts.astype(np.float32) @ columns / n
    return means


def bootstrap_interval(
    table: np.ndarray, means: np.ndarray, *, seed: int = 0
) -> tuple[float, float]:
    """The seed × image interval of the mean of `table` (S ≥ 2, N ≥ 2), right answers or differences
    of them; means (RESAMPLES, S): theirs from `resampled_images`.

    Seeds and images are crossed: a model answers every image. θ* = m + f·(m̄* − m) + c·(m̄° − m),
    m̄* over resampled images, m̄° over S resampled seeds. Plain resampling of both counts what
    varies with seed and image at once three times. It belongs to the seeds' share; from the
    images' it is taken by f² = max(0, 1 − MSE/MSI), the mean squares of a two-way analysis of
    variance (Searle, Casella and McCulloch 1992). Few resampled seeds vary too little:
    c = √(S/(S−1))·t/z gives their share the width of Student's t (Hesterberg 2015). √2/(N + 2) is
    added as in `images_variance`: no interval is a point.
    """
    (seeds, images), by_seed = table.shape, table.mean(1)
    m = by_seed.mean()
    mse, msi = _mean_squares(table)
    f = math.sqrt(max(0.0, 1 - mse / msi)) if msi else 0.0
    c = math.sqrt(seeds / (seeds - 1)) * t_quantile(seeds) / ndtri(0.5 + LEVEL / 2)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(seeds, size=means.shape)
    theta = m + f * (means.mean(1) - m) + c * (by_seed[drawn].mean(1) - m)  # (RESAMPLES,)
    theta += math.sqrt(2) / (images + 2) * generator.standard_normal(len(theta))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(theta, [tail, 1 - tail])
    return float(low), float(high)


def _mean_squares(table: np.ndarray) -> tuple[float, float]:
    """MSE and MSI of a two-way table (S, N) of seeds and images."""
    (seeds, images), by_image = table.shape, table.mean(0)
    residual = table - table.mean(1)[:, None] - by_image + by_image.mean()
    mse = (residual**2).sum() / ((seeds - 1) * (images - 1))
    return float(mse), float(seeds * by_image.var(ddof=1))


# --- tests ----------------------------------------------------------------------------------------
# Of a mean difference m over S seeds on N images, by t = m/√(s²/S + v) with S − 1 degrees of
# freedom: s² among the seeds' differences, v from `images_variance`. More seeds alone would test
# what holds on these images.


def images_variance(table: np.ndarray) -> float:
    """What the choice of test images adds to the variance of the mean of `table` (S ≥ 2, N ≥ 2),
    differences −1, 0 or 1: (MSI − MSE)/(S·N), not below 0, + 2/(N + 2)².

    The last as if two more images had spoken, one for each side (Bonett and Price 2012): that two
    models answer N images alike leaves room for a difference of the order of 1/N on others.
    """
    (seeds, images), (mse, msi) = table.shape, _mean_squares(table)
    return max(0.0, msi - mse) / (seeds * images) + 2 / (images + 2) ** 2


def paired_p(differences: Sequence[float], images: float = 0.0) -> float:
    """Two-sided paired t-test. NaN with one seed, or where all differ equally and images = 0: seeds
    that do not vary say nothing of how others would."""
    error = _error(differences, images) if len(differences) > 1 else 0.0
    if not error:
        return math.nan
    t = abs(float(np.mean(differences))) / error
    return float(2 * stdtr(len(differences) - 1, -t))


def equivalence_p(
    differences: Sequence[float], images: float | None, margin: float = MARGIN
) -> float:
    """Two one-sided t-tests (Schuirmann 1987) of |mean| ≥ margin, the larger p.

    NaN, that is no test, with fewer than SEEDS seeds, whose spread is hardly known, or where the
    images' share is not known (None). Fewer than `least_images` cannot give p ≤ 0.05.
    """
    if len(differences) < SEEDS or images is None:
        return math.nan
    if not (error := _error(differences, images)):
        return math.nan
    t = (margin - abs(float(np.mean(differences)))) / error
    return float(stdtr(len(differences) - 1, -t))


def least_images(seeds: int, margin: float = MARGIN) -> int:
    """From how many test images on models can be shown to be equivalent: t_{S−1}·√2/(N + 2), the
    least that the test may leave open, is then below the margin."""
    return math.ceil(float(stdtrit(seeds - 1, LEVEL)) * math.sqrt(2) / margin) - 2


def _error(differences: Sequence[float], images: float) -> float:
    return math.sqrt(standard_error(differences) ** 2 + images)


def mcnemar_p(right: np.ndarray, control: np.ndarray) -> float:
    """McNemar's exact mid-p test (Fagerland et al. 2013) of two (S, N) tables of right answers.

    Pooled over seeds with the image as unit: an image speaks for the side which more seeds answer
    rightly, and not at all if as many do. Seeds that share their images are thus not counted as if
    each had images of its own; with one seed it is McNemar's test itself.
    """
    sums = np.sign(right.sum(0, dtype=np.int64) - control.sum(0, dtype=np.int64))  # (N,)
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
