"""`tab bench growth`: time against N, forward and forward + backward.

All start at N = 64. A rival drops out where its next point could take too long, were it to grow as
N², or where the machine has no memory for it. Up to JUDGED tokens each is first checked against
float64; beyond, the reference would not fit, and nothing is checked.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .cases import Case
from .measure import measure
from .peak_memory import free, panel, tokens
from .roofline import Roofline
from .rows import Row
from .turns import fresh

LENGTHS = tuple(4**i for i in range(3, 9))  # 64 to 65,536
JUDGED = 4096
DIRECTIONS = ("forward", "both")
Value = Callable[[Row], float | None]  # of a point, or None where there is none


def curves(
    op: str,
    lengths: Sequence[int],
    roofline: Roofline,
    limit: float,
    budget: float,
    only: Callable[[str], bool] = bool,  # of a name: any
) -> Iterator[list[Row]]:
    """The rows of one op at each N, which a process of its own measures. limit: seconds that a call
    of a rival may take; budget: seconds of timing for each contestant, direction and N."""
    before: list[Row] = []
    for n in lengths:
        case = Case(op, f"n{n}")
        late = {row.contestant: why for row in before if (why := _late(row, n, limit))}
        one = partial(_point, roofline=roofline, budget=budget, late=frozenset(late), only=only)
        before = fresh(one, case) + [Row(case.name, name, skipped=late[name]) for name in late]
        yield before


def milliseconds(direction: str) -> Value:
    def value(row: Row) -> float | None:
        times = row.seconds.get(direction)
        return 1e3 * statistics.median(times) if times else None

    return value


def exponent(rows: list[Row], value: Value, start: int = 1024) -> float | None:
    """e in value ~ N^e from `start` tokens on, where no fixed cost rules, least squares over the
    logarithms; None of fewer than two points."""
    known = [(tokens(row), x) for row in rows if (x := value(row)) and tokens(row) >= start]
    if len(known) < 2:
        return None
    n, y = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(n, y, 1)[0])


def _late(row: Row, n: int, limit: float) -> str | None:
    """Why this contestant does not go on to n, or None."""
    if row.skipped or row.contestant == "tab":
        return row.skipped
    took = max(statistics.median(times) for times in row.seconds.values())
    guess = took * (n / tokens(row)) ** 2
    return f"could take {guess:.0f} s a call, {limit:g} may" if guess > limit else None


def _point(
    case: Case, roofline: Roofline, budget: float, late: frozenset[str], only: Callable[[str], bool]
) -> list[Row]:
    _limit_memory()
    return measure(
        case,
        roofline,
        directions=DIRECTIONS,
        budget=budget,
        only=lambda name: only(name) and name not in late and not name.startswith("tab "),
        judge=case.shape[2] <= JUDGED,
    )


def _limit_memory() -> None:
    """What does not fit is then an error of this contestant, and not the end of the process."""
    try:
        import resource
    except ImportError:  # Windows
        return
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + free() * 4 // 5,) * 2)


# --- the picture ----------------------------------------------------------------------------------


def picture(rows: list[Row], path: Path) -> None:
    """Time against N, both logarithmic: a row of panels for each direction, a panel for each op.
    Dotted lines grow as N and N²."""
    from ..drawing.figures import Picture  # what only measures needs no matplotlib

    ops = list(dict.fromkeys(row.case.split("/")[0] for row in rows))
    size = (3.2 * len(ops) + 1, 3.6 * len(DIRECTIONS))
    figure = Picture(figsize=size, layout="tight")
    axes = figure.subplots(len(DIRECTIONS), len(ops), sharey="row", squeeze=False)
    for line, way in zip(axes, DIRECTIONS, strict=True):
        value = milliseconds(way)
        for axis, op in zip(line, ops, strict=True):
            panel(axis, op, [r for r in rows if r.case.startswith(f"{op}/") and value(r)], value)
        line[0].set_ylabel("ms, forward + backward" if way == "both" else f"ms, {way}")
    figure.keep(path, dpi=110)
