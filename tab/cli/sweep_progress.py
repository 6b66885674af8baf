"""What a sweep shows while it runs."""

from __future__ import annotations

from collections.abc import Callable

from ..sweep.driver import SweepWatcher
from .terminal import say


class RungLines(SweepWatcher):
    """A line for each configuration's rung. epochs: of the rungs. bar: told (done, total, what),
    the epochs of the rung that is trained."""

    def __init__(self, epochs: tuple[int, ...], bar: Callable[[int, int, str], None]):
        self.epochs, self.bar = epochs, bar

    def step(self, bracket, rung, entries) -> None:
        self.rung, self.runs, self.ended = rung, len(entries), 0
        before = self.epochs[rung - 1] if rung > bracket.first else 0
        self.total = len(entries) * (self.epochs[rung] - before)
        self.before, self.done = before, {}
        if entries:
            text = f"rung {rung + 1}, to epoch {self.epochs[rung]}: {self.runs} configurations"
            say(text)

    def epoch(self, pair, entry, row) -> None:
        self.done[pair, entry.configuration] = row["epoch"] - self.before
        what = f"rung {self.rung + 1}: {self.ended} of {self.runs}"
        self.bar(sum(self.done.values()), self.total, what)

    def end(self, pair, ended) -> None:
        self.ended += 1
        score = f"validation {ended.score:.1%}" if ended.status == "done" else ended.status
        name = f"{pair[0]}-{pair[1]}-c{ended.entry.configuration:03}"
        text = f"  [{self.ended}/{self.runs}] {name}: {score}, {ended.seconds:.1f} s"
        style = "red" if ended.score is None else None
        say(f"{text}  {ended.error}".rstrip(), style=style)
