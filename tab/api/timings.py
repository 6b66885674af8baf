"""`tab.bench`, and what it measured as an object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from ..bench.cases import SIZES
from ..bench.charts import picture
from ..bench.measure import measure
from ..bench.page import write_page
from ..bench.registry import cases, chosen
from ..bench.registry import names as op_names
from ..bench.results import check_place, environment, save
from ..bench.roofline import measure_roofline
from ..bench.rows import DIRECTIONS, Row, percentiles, row_speedup
from ..bench.turns import Load, busy, in_turns
from ..drawing.figures import Picture
from .given import listed
from .result import Result, drawn
from .rows import Rows
from .told import Tell, silent

SHOWN = ("case", "contestant", "direction", "ms", "ms_p10", "ms_p90", "speedup", "skipped")


def bench(
    ops: str | Iterable[str] = "all",
    sizes: str | Iterable[str] = "vision",
    *,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    directions: str | Iterable[str] = ("forward", "both"),
    contestants: str | Iterable[str] = "all",
    budget: float = 3.0,
    cold: bool = False,
    processes: int = 5,
    out: str | Path | None = None,
    tell: Tell | None = print,
) -> Timings:
    """Checks each contestant against float64, then times them in turns: `tab bench` of the shell.

    ops, sizes: names, in a list or separated by commas, or "all". directions: "forward",
        "backward", "both" (one after the other). contestants: those beside TAB's own, by the
        beginnings of their names.
    budget: seconds of measuring for each contestant and direction. cold: caches are emptied before
        each call. processes: so many fresh ones measure, one after the other, as calls within one
        share its luck; 1 measures in this process. A script that starts others has to do so under
        `if __name__ == "__main__":`.
    out: a JSON file for the results, with a page and a picture beside it, which `tab bench compare`
        reads; by default nothing is kept.
    tell: gets a line for each case and process; None: silence.

    Raises ValueError: an unknown name, a number out of range, or a place for no JSON file.

    >>> found = tab.bench(
    ...     "linear", "tiny", directions="forward", contestants="eager", budget=0.1, processes=1,
    ...     out="bench/linear.json", tell=None,
    ... )
    >>> found.rows()[0]["contestant"], found.rows()[0]["error"] < 1e-4
    ('tab', True)
    >>> found.plot().savefig("linear.png")
    """
    wanted, say = tuple(chosen(listed(directions), DIRECTIONS, "directions")), tell or silent
    every = chosen(listed(ops), op_names(), "ops"), chosen(listed(sizes), SIZES, "sizes")
    beginnings = None if contestants == "all" else tuple(listed(contestants))
    raced = cases(*every, (causal,), dtype, device)
    if processes < 1:
        raise ValueError(f"processes = {processes}: give 1 or more")
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget = {budget}: give a number of seconds, 0 or more")
    path, found = Path(out) if out else None, {}
    if path:
        check_place(path)
    facts, roofline, load = environment(device), measure_roofline(dtype, device), Load()
    one = partial(
        measure,
        roofline=roofline,
        directions=wanted,
        budget=budget / processes,
        min_rounds=5 if processes == 1 else 3,
        cold=cold,
        only=partial(_entered, beginnings),
    )
    for count, (i, group) in enumerate(in_turns(raced, one, processes), 1):
        found[i] = group
        say(f"[{count}/{len(raced) * processes}] {raced[i].name}")
        load.note()
        rows = [row for mine in found.values() for row in mine]
        if path:  # each time, so that what was measured is kept
            record = save(path, rows, roofline, facts, "tab.bench", load.record())
    if path:
        picture(rows, path.with_suffix(".png"))
        write_page(path.with_suffix(".html"), record, rows)
    if words := busy(load.record(), torch.get_num_threads()):
        say(f"{words}: times are longer than the code's own")
    return Timings(rows, facts, path)


def _entered(beginnings: tuple[str, ...] | None, name: str) -> bool:
    return beginnings is None or name == "tab" or name.startswith(beginnings)


class Timings(Result):
    """What `bench` measured. measured: the rows of tab/bench/rows.py, with each single time.
    environment: machine, versions, threads. path: of the JSON file, if there is one."""

    def __init__(self, measured: list[Row], environment: dict[str, object], path: Path | None):
        self.measured, self.environment, self.path = measured, environment, path
        self.directory = path.parent if path else None

    def rows(self) -> Rows:
        """One for each case, contestant and direction: milliseconds (median, 10th and 90th
        percentile), how many times faster TAB is in the same rounds, the time over the least that
        the machine allows, errors relative to the largest value of float64, the peak of memory in
        bytes; or why it was skipped."""
        base = {row.case: row for row in reversed(self.measured)}  # TAB's own comes first
        found = [
            _row(row, base[row.case], direction)
            for row in self.measured
            for direction in row.seconds or [None]
        ]
        return Rows(found, {key: key for key in SHOWN})

    def headline(self) -> str:
        kept = f"{self.path}: " if self.path else ""
        machine, threads = self.environment["cpu"], self.environment["threads"]
        return f"{kept}{machine}, {threads} threads, torch {self.environment['torch']}"

    def plot(self) -> Picture:
        """A panel for each case."""
        return drawn(lambda path: picture(self.measured, path))


def _row(row: Row, base: Row, direction: str | None) -> dict[str, object]:
    low = mid = high = times = floor = None
    if direction:
        low, mid, high = (1e3 * x for x in percentiles(row.seconds[direction]))
        floor = mid / 1e3 / row.floor[direction] if row.floor.get(direction) else None
        if row is not base and direction in base.seconds:
            times = row_speedup(row, base, direction)
    return {
        "case": row.case,
        "contestant": row.contestant,
        "direction": direction,
        **{"ms": mid, "ms_p10": low, "ms_p90": high},
        "speedup": times[1] if times else None,
        "speedup_p10": times[0] if times else None,
        "speedup_p90": times[2] if times else None,
        "over_floor": floor,
        **{"error": row.error, "gradient_error": row.gradient_error},
        "peak_bytes": row.peak_bytes,
        "skipped": row.skipped,
    }
