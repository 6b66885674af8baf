"""What is said while a comparison or a sweep runs: a line for each run that ended."""

from __future__ import annotations

from collections.abc import Callable

from ..cli.progress import ended
from ..compare.driver import Watcher
from ..sweep.driver import SweepWatcher

Tell = Callable[[str], object]  # such as print


def silent(_: str) -> None:
    """tell=None."""


class ToldRuns(Watcher):
    """Of a comparison, a line for each run."""

    def __init__(self, tell: Tell):
        self.tell, self.count = tell, 0

    def start(self, runs: int, epochs: int) -> None:
        self.runs = runs

    def end(self, run) -> None:
        self.count += 1
        self.tell(f"[{self.count}/{self.runs}] {ended(run)}")


class ToldRungs(SweepWatcher):
    """Of a sweep, a line for each configuration's rung."""

    def __init__(self, tell: Tell):
        self.tell = tell

    def step(self, bracket, rung, entries) -> None:
        self.rung, self.runs, self.count = rung + 1, len(entries), 0

    def end(self, pair, ended) -> None:
        self.count += 1
        score = f"validation {ended.score:.1%}" if ended.status == "done" else ended.status
        name = f"{pair[0]}-{pair[1]}-c{ended.entry.configuration:03}"
        text = f"[rung {self.rung}, {self.count}/{self.runs}] {name} {score}, {ended.seconds:.1f} s"
        self.tell(f"{text}  {ended.error}".rstrip())
