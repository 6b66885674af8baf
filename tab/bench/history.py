"""`tab bench history FILE…`: how TAB's own times moved from one commit to the next.

Times of two runs are not comparable by themselves, as the machine was busier in one of them. So
each process gives one number, the median over its rounds of seconds over the yardstick's seconds in
the same round (turns.py), as in `tab bench compare`; a point is the median over processes, and its
range reaches from the least to the largest. All are shown as the first run's over this one's: 2 is
twice as fast as at first.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .charts import SAID, is_ours
from .regress import differences
from .results import load
from .rows import Row


@dataclass(frozen=True)
class Point:
    """Of one run: times as fast as the first, and the least and the largest over processes."""

    commit: str
    value: float
    low: float
    high: float
    ms: float


@dataclass(frozen=True)
class Line:
    """Of one case, contestant and direction, in the order of the runs."""

    case: str
    contestant: str
    direction: str
    points: list[Point]


def history(paths: Sequence[Path], *, force: bool = False) -> list[Line]:
    """Of TAB's own contestants, over results of `tab bench` given oldest first.

    ValueError: fewer than two files, files of two machines (unless force), a file from before there
    was a yardstick, or nothing in common.
    """
    if len(paths) < 2:
        raise ValueError("a history needs at least two results: give the oldest first")
    runs = [(path, *load(path)) for path in paths]
    first_path, first, _ = runs[0]
    for path, record, _ in runs[1:]:
        machine, _other = differences(first, record)
        if machine and not force:
            raise ValueError(
                f"{first_path} and {path} are not of one machine ({'; '.join(machine)}): give "
                "results of one, or show them nevertheless with --force"
            )
    times: dict[tuple[str, str, str], list[tuple[str, Row]]] = {}
    for path, record, rows in runs:
        for row in rows:
            if not is_ours(row.contestant) or row.skipped:
                continue
            for direction in row.seconds:
                if not row.pace.get(direction):
                    raise ValueError(
                        f"{path} has no yardstick beside {row.contestant} at {row.case}: it is of "
                        "an older version; measure that commit again"
                    )
                commit = str(record["environment"].get("commit") or path.stem)
                times.setdefault((row.case, row.contestant, direction), []).append((commit, row))
    lines = [_line(key, runs) for key, runs in times.items() if len(runs) > 1]
    if not lines:
        raise ValueError("these results have no case, contestant and direction in common")
    return lines


def _line(key: tuple[str, str, str], runs: list[tuple[str, Row]]) -> Line:
    direction, points, base = key[2], [], None
    for commit, row in runs:
        each = [
            statistics.median(t / y for t, y in zip(times, pace, strict=True))
            for times, pace in row.by_process(direction)
        ]
        middle = statistics.median(each)
        base = middle if base is None else base
        ms = 1e3 * statistics.median(row.seconds[direction])
        points.append(Point(commit, base / middle, base / max(each), base / min(each), ms))
    return Line(*key, points)


def charts(lines: list[Line]) -> list[dict]:
    """A chart for each direction, a line for each case; the runs stand in their order."""
    drawn = []
    for direction in dict.fromkeys(line.direction for line in lines):
        mine = [line for line in lines if line.direction == direction]
        commits = list(dict.fromkeys(p.commit for line in mine for p in line.points))
        drawn.append(
            {
                "kind": "curves",
                "title": f"TAB's times over commits, {SAID[direction]}",
                **{"xlabel": "commit", "ylabel": "times as fast as at first", "ylog": True},
                **{"xat": list(range(len(commits))), "xnames": commits},
                "shared": False,
                "series": [
                    {
                        "key": _name(line),
                        "x": [commits.index(p.commit) for p in line.points],
                        **{k: [getattr(p, a) for p in line.points] for k, a in _ENDS.items()},
                        "dots": True,
                    }
                    for line in mine
                ],
            }
        )
    return drawn


_ENDS = {"y": "value", "low": "low", "high": "high"}
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#882255")


def looks(lines: list[Line]) -> dict[str, dict]:
    """Of each line, for the page."""
    names = list(dict.fromkeys(map(_name, lines)))
    return {
        name: {
            **{"name": name, "width": 1.8, "color": _HUES[i % len(_HUES)]},
            "dash": "6 3" if i // len(_HUES) % 2 else "",
        }
        for i, name in enumerate(names)
    }


def _name(line: Line) -> str:
    return f"{line.case} {line.contestant.removeprefix('tab').strip()}".strip()
