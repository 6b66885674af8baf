"""What is known of one contestant at one case, and what its times say."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

DIRECTIONS = ("forward", "backward", "both")


@dataclass
class Row:
    """One contestant at one case: its error, then seconds per call for each direction."""

    case: str
    contestant: str
    error: float | None = None
    gradient_error: float | None = None
    skipped: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    # Beside each of `seconds`, the yardstick in the same round; and how many of them each process
    # took, one after the other. Empty in files from before there were either.
    pace: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[int]] = field(default_factory=dict)
    peak_bytes: int | None = None
    held_bytes: int | None = None  # of the cache, where a call is a step of decoding
    batch: int | None = None  # images in a call that is a training step; sequences, of decoding
    tokens: int | None = None  # N of its model, or what was decoded before
    floor: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def timed(self, direction: str, seconds: list[float], pace: list[float]) -> None:
        """What one process measured."""
        self.seconds[direction], self.pace[direction] = seconds, pace[: len(seconds)]
        self.rounds[direction] = [len(seconds)]

    def by_process(self, direction: str) -> list[tuple[list[float], list[float]]]:
        """(seconds, the yardstick's seconds) of each process; the latter may be empty."""
        seconds, pace = self.seconds[direction], self.pace.get(direction, [])
        parts, start = [], 0
        for n in self.rounds.get(direction) or [len(seconds)]:
            parts.append((seconds[start : start + n], pace[start : start + n]))
            start += n
        return parts


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """p10, p50, p90"""
    if len(times) < 2:
        return (times[0],) * 3
    q = statistics.quantiles(times, n=10, method="inclusive")
    return q[0], statistics.median(times), q[8]


def speedup(theirs: list[float], ours_: list[float]) -> tuple[float, float, float]:
    """How many times faster we are: p10, p50, p90 of the ratio within each round."""
    return percentiles([t / o for t, o in zip(theirs, ours_, strict=False)])


def row_speedup(theirs: Row, ours_: Row, direction: str) -> tuple[float, float, float]:
    """`speedup` of two rows of one case: their rounds pair within each process."""
    parts = zip(theirs.by_process(direction), ours_.by_process(direction), strict=False)
    pairs = [pair for (a, _), (b, _) in parts for pair in zip(a, b, strict=False)]
    return speedup(*zip(*pairs, strict=True))


def worst_of(errors: list[float]) -> float | None:
    """The largest; NaN if any is, which `max` can pass over."""
    return next((e for e in errors if math.isnan(e)), max(errors, default=None))
