"""A benchmark in fresh processes, in turns: every unit once, then every unit once more, …

Calls within one process share its luck (where memory lies, what the compiler chose, who else ran in
that minute), so many of them say little of the next process. The unit of comparison is a process;
and since the turns of a case are spread over the whole run, a busy minute hits one of them alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from ..plugins import Plugin, load, loaded
from .rows import Row, worst_of

BUSY = 0.5  # threads of others, on average, from which on times are disturbed


def in_turns(
    units: Sequence, measure: Callable[[object], list[Row]], processes: int
) -> Iterator[tuple[int, list[Row]]]:
    """(which unit, its rows of all processes so far) after each process. measure: picklable; it
    gives the rows of one unit, which one process measured."""
    found: dict[int, list[Row]] = {}
    for _ in range(processes):
        for i, unit in enumerate(units):
            rows = measure(unit) if processes == 1 else fresh(measure, unit)
            found[i] = merged(found[i], rows) if i in found else rows
            yield i, found[i]


def fresh(measure: Callable, unit: object) -> list[Row]:
    """The rows of one unit, measured in a new process; measure: picklable."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _end_with_caller) as pool:
        try:
            threads = torch.get_num_threads()
            return pool.submit(_measure, measure, unit, threads, loaded()).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"the process that measured {getattr(unit, 'name', unit)} was killed; was there "
                "memory enough? --ops, --sizes and --contestants choose less"
            ) from None
        except KeyboardInterrupt:  # else this would wait for what nobody wants any more
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _end_with_caller() -> None:
    """A caller that is killed leaves nothing behind that waits for its next word."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure(
    measure: Callable, unit: object, threads: int, plugins: tuple[Plugin, ...]
) -> list[Row]:
    load(plugins)
    torch.set_num_threads(threads)
    try:
        return measure(unit)
    finally:
        gc.freeze()  # as in cli/main.py


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """One row of two for each contestant. Who is wrong or fails in one process is not timed."""
    before = {row.contestant: row for row in old}
    rows = []
    for row in new:
        was = before[row.contestant]
        if skipped := was.skipped or row.skipped:
            row.skipped, row.seconds, row.pace, row.rounds = skipped, {}, {}, {}
        for name in ("seconds", "pace", "rounds"):
            mine, other = getattr(row, name), getattr(was, name)
            setattr(row, name, {d: other[d] + values for d, values in mine.items()})
        for name in ("error", "gradient_error", "peak_bytes"):
            known = [x for x in (getattr(was, name), getattr(row, name)) if x is not None]
            setattr(row, name, worst_of(known))
        rows.append(row)
    return rows


class Load:
    """The load averages of a run, over the last minute, as the system gives them."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.note()

    def note(self) -> None:
        try:
            self.seen.append(round(os.getloadavg()[0], 2))
        except OSError:  # a system that keeps none
            return

    def record(self) -> dict[str, object] | None:
        if not self.seen:
            return None
        return {"start": self.seen[0], "most": max(self.seen), "cores": os.cpu_count()}


def busy(load: dict | None, threads: int) -> str:
    """A warning where others used the machine; "" where they did not, or nothing is known."""
    if not load:
        return ""
    others = max(load["start"], load["most"] - threads)
    if others < BUSY:
        return ""
    return (
        f"the machine was not idle: load average {load['start']:g} before, up to {load['most']:g}, "
        f"of which {threads} may be this run's own, on {load['cores']} cores"
    )
