"""Which training times other work on the machine decided, more than the mechanism."""

from __future__ import annotations

from collections.abc import Iterable

from .runs import Run

LIMIT = 1.5  # times as long as undisturbed, and times as long as another seed
RULE = (
    "A star marks a time that other work on the machine decided: a run took more than "
    f"{LIMIT:g} times as long as it would have without waiting for a core (where that was not "
    "recorded: with all epochs as fast as its fastest), or seeds differ by more than that. A ratio "
    "has a star where either of its times has one."
)

STAR = (  # the same in short, below a figure
    f"A star marks a time that other work on the machine made more than {LIMIT:g} times as long, "
    "or on which seeds differ by more than that."
)


def slowdown(run: Run) -> float | None:
    """Its training time over what it would have been undisturbed; None where nothing tells.

    What that would have been is read off its rows: on a CPU the seconds less those in which one of
    its threads was ready to compute and had no core; where a system does not tell these, the
    processor time of a run of one thread. On a GPU, and in results of before, it is the time that
    all epochs would take at the pace of the fastest; on a GPU without the first one, in which
    kernels are compiled.
    """
    rows = run.rows if run.device == "cpu" else run.rows[1:]
    if not rows:
        return None
    seconds = sum(row["seconds"] for row in rows)
    own = None
    if run.device == "cpu":
        own = _own_time(rows, run.threads)
    if own is None and len(rows) > 1:
        own = len(rows) * min(row["seconds"] for row in rows)
    return seconds / own if own else None


def _own_time(rows: list[dict], threads: int) -> float | None:
    """Seconds on a CPU without waiting, where all rows have what tells it."""
    if all(row.get("waited_seconds") is not None for row in rows):
        return sum(row["seconds"] - row["waited_seconds"] for row in rows)
    if threads == 1 and all(row.get("cpu_seconds") is not None for row in rows):
        return sum(row["cpu_seconds"] for row in rows)
    return None


def spread(runs: Iterable[Run]) -> float | None:
    """The slowest seed's training time over the fastest's, where there are two with a result."""
    times = [s for run in runs if run.scored and (s := run.summary.get("total_training_time"))]
    return max(times) / min(times) if len(times) > 1 else None


def disturbed(runs: Iterable[Run]) -> bool | None:
    """Of one mechanism's seeds; None where nothing tells."""
    good = [run for run in runs if run.scored]
    told = [x for x in (spread(good), *map(slowdown, good)) if x is not None]
    return any(x > LIMIT for x in told) if told else None
