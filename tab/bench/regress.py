"""`tab bench compare OLD NEW`: is anything slower, wrong or gone?

The unit is a process (turns.py): x = ln(median over its rounds of seconds / the yardstick's seconds
in the same round). A kernel has changed if Welch's t-test over the x of both runs gives p < alpha
after Holm's correction over all comparisons, and exp(mean difference) is at least `effect` away
from 1, and further than the yardstick itself has moved: by that much the machine was another.
"same" is said only where the 1 − alpha interval lies within `effect`, and nothing is decided where
it is wider than ±COARSE. One process has no spread, so it decides nothing either, however many its
rounds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from ..statistics import holm
from .rows import Row

SLOWER, FASTER, SAME, OPEN = "slower", "faster", "same", "not told apart"
COARSE = 0.2  # a comparison that may have missed so much has not been made
TICK = 1e-3  # relative: no two processes agree to less, whatever three of them show
# Facts of the environment without which times are not of one machine.
MACHINE = ("cpu", "gpu", "isa", "threads")


@dataclass(frozen=True)
class Change:
    case: str
    contestant: str
    direction: str  # "" where it is not of one
    verdict: str
    old: float | None = None  # median seconds
    new: float | None = None
    ratio: float | None = None  # new over old, each over its yardstick
    low: float | None = None  # its 1 − alpha interval
    high: float | None = None
    p: float | None = None  # Holm-adjusted

    @property
    def ours(self) -> bool:
        return self.contestant.split()[0] == "tab"

    @property
    def bad(self) -> bool:
        """Slower, wrong or gone."""
        return self.verdict == SLOWER or self.verdict.startswith(("gone", "wrong", "failed"))

    @property
    def undecidable(self) -> bool:
        return self.verdict.startswith("undecidable")


def compare(
    old: list[Row], new: list[Row], *, alpha: float = 0.01, effect: float = 0.05
) -> list[Change]:
    """Every (case, contestant, direction) that either run timed."""
    after = {(row.case, row.contestant): row for row in new}
    before = {(row.case, row.contestant): row for row in old}
    found, judged = [], []
    for key in dict.fromkeys((*before, *after)):
        a, b = before.get(key), after.get(key)
        for direction in dict.fromkeys((*_timed(a), *_timed(b))):
            if lost := _lost(a, b, direction):
                found.append(Change(*key, direction, lost))
            else:
                judged.append(_judged(a, b, direction, alpha))
    if not judged and not any(change.bad for change in found):
        raise ValueError("the two runs have no case, contestant and direction in common")
    corrected = holm([math.nan if c.p is None else c.p for c, _ in judged])
    for (c, drift), p in zip(judged, corrected, strict=True):
        verdict = c.verdict or _verdict(c, drift, p, alpha, effect)
        found.append(
            Change(c.case, c.contestant, c.direction, verdict, c.old, c.new, c.ratio, c.low, c.high,
                   None if math.isnan(p) else p)
        )  # fmt: skip
    return sorted(found, key=lambda c: (c.case, c.contestant, c.direction))


def _timed(row: Row | None) -> dict:
    return {} if row is None or row.skipped else row.seconds


def _lost(a: Row | None, b: Row | None, direction: str) -> str:
    """Why there is nothing to compare; "" if there is."""
    if direction not in _timed(a):
        return f"new: not timed before{f' ({a.skipped})' if a and a.skipped else ''}"
    if b is None:
        return "gone: not in the new run"
    if b.skipped:
        word = "" if b.skipped.startswith("wrong") else "gone: "
        return f"{word}{b.skipped}"
    if direction not in b.seconds:
        return "gone: this direction is not in the new run"
    for row, which in ((a, "old"), (b, "new")):
        if not all(math.isfinite(x) and x > 0 for x in row.seconds[direction] or [math.nan]):
            return f"failed: the {which} run holds times that are none (NaN, 0 or less, or no time)"
    return ""


def _judged(a: Row, b: Row, direction: str, alpha: float) -> tuple[Change, float]:
    """With p before correction and no verdict but that it is undecidable; and ln of the yardstick's
    own change."""
    was, now = (statistics.median(row.seconds[direction]) for row in (a, b))
    fields = {"old": was, "new": now, "ratio": now / was}
    counts = [len(row.by_process(direction)) for row in (a, b)]
    verdict = ""
    if min(counts) < 2:
        verdict = f"undecidable: {counts[0]} and {counts[1]} processes, at least 2 each"
    elif not all(row.pace.get(direction) for row in (a, b)):
        verdict = "undecidable: no yardstick was timed"
    if verdict:
        return Change(a.case, a.contestant, direction, verdict, **fields), 0.0
    (x, pace_x), (y, pace_y) = (_logs(row, direction) for row in (a, b))
    moved, half, p = welch(x, y, alpha)
    fields |= {"ratio": math.exp(moved), "p": p}
    fields |= {"low": math.exp(moved - half), "high": math.exp(moved + half)}
    drift = float(np.mean(pace_y) - np.mean(pace_x))
    return Change(a.case, a.contestant, direction, "", **fields), drift


def _logs(row: Row, direction: str) -> tuple[list[float], list[float]]:
    """Of each process: ln of the median ratio to the yardstick, and of the yardstick's median."""
    parts = row.by_process(direction)
    ratios = [[t / y for t, y in zip(*part, strict=True)] for part in parts]
    return (
        [math.log(statistics.median(each)) for each in ratios],
        [math.log(statistics.median(pace)) for _, pace in parts],
    )


def welch(x: list[float], y: list[float], alpha: float) -> tuple[float, float, float]:
    """mean(y) − mean(x), half the width of its 1 − alpha interval, and p that it is 0 (Welch 1947,
    two-sided); no standard deviation counts as less than TICK."""
    from scipy.special import stdtr, stdtrit

    parts = [max(float(np.var(v, ddof=1)), TICK**2) / len(v) for v in (x, y)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(v**2 / (len(z) - 1) for v, z in zip(parts, (x, y), strict=True))
    moved = float(np.mean(y) - np.mean(x))
    half = float(stdtrit(freedom, 1 - alpha / 2)) * error
    return moved, half, float(2 * stdtr(freedom, -abs(moved) / error))


def _verdict(c: Change, drift: float, p: float, alpha: float, effect: float) -> str:
    limit = math.log1p(effect)
    moved = abs(math.log(c.ratio))
    if p < alpha and moved >= limit:
        if moved <= abs(drift):
            return f"undecidable: the machine itself took {math.exp(drift):.2f}× the time"
        return SLOWER if c.ratio > 1 else FASTER
    if math.log(c.high / c.low) > 2 * math.log1p(COARSE):
        return "undecidable: too noisy; take more --processes, or a quieter machine"
    within = -limit < math.log(c.low) and math.log(c.high) < limit
    return SAME if within else OPEN


def differences(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """Of two records: what makes their times those of two machines, and what else differs."""
    a, b = old["environment"], new["environment"]
    machine, other = [], []
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            text = f"{key}: was {a.get(key)}, now {b.get(key)}"
            (machine if key in MACHINE else other).append(text)
    return machine, other
