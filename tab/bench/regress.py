"""`tab bench compare OLD NEW`: is the new run slower, beyond noise and beyond what matters?

A change counts when a two-sided Mann–Whitney rank test gives p < alpha after Holm's correction over
all comparisons, and the medians differ by at least `effect`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .measure import Row


@dataclass(frozen=True)
class Change:
    case: str
    contestant: str
    direction: str
    old: float  # median seconds
    new: float
    p: float  # Holm-adjusted
    verdict: str  # "slower", "faster" or "same"


def compare(
    old: list[Row], new: list[Row], *, alpha: float = 0.01, effect: float = 0.05
) -> list[Change]:
    """Every (case, contestant, direction) that both runs timed."""
    from scipy.stats import mannwhitneyu

    before = {(row.case, row.contestant): row for row in old}
    pairs = []
    for row in new:
        earlier = before.get((row.case, row.contestant))
        for direction in set(row.seconds) & set(earlier.seconds if earlier else ()):
            a, b = earlier.seconds[direction], row.seconds[direction]
            pairs.append((row, direction, a, b, mannwhitneyu(a, b).pvalue))
    if not pairs:
        raise ValueError("the two runs have no case, contestant and direction in common")
    adjusted = _holm([pair[-1] for pair in pairs])
    changes = []
    for (row, direction, a, b, _), p in zip(pairs, adjusted, strict=True):
        was, now = statistics.median(a), statistics.median(b)
        verdict = "same"
        if p < alpha and abs(now / was - 1) >= effect:
            verdict = "slower" if now > was else "faster"
        changes.append(Change(row.case, row.contestant, direction, was, now, p, verdict))
    return sorted(changes, key=lambda c: (c.case, c.contestant, c.direction))


def _holm(p: list[float]) -> list[float]:
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted
