"""A sweep whose runs are watched by other programs as well (tab/tracking/): each rung of a
configuration is a piece of one run."""

from __future__ import annotations

from ..tracking import Watchers
from .driver import SweepWatcher, run_name
from .halving import Bracket
from .plan import SweepPlan
from .record import Ended, Entry
from .trials import Pair


class WatchedSweep(SweepWatcher):
    """Tells `runs` of each configuration, and all of it to `shown`."""

    def __init__(self, plan: SweepPlan, runs: Watchers, shown: SweepWatcher | None = None):
        self.plan, self.runs, self.shown = plan, runs, shown or SweepWatcher()

    def step(self, bracket: Bracket, rung: int, entries: list[tuple[Pair, Entry]]) -> None:
        self.shown.step(bracket, rung, entries)

    def epoch(self, pair: Pair, entry: Entry, row: dict) -> None:
        config = self.plan.config(pair, entry.params)
        self.runs.epoch(run_name(pair, entry.configuration), config, row)
        self.shown.epoch(pair, entry, row)

    def end(self, pair: Pair, ended: Ended) -> None:
        last = max(ended.curve, default=0)
        summary = {"validation_accuracy": ended.score, "rung": ended.entry.rung + 1}
        summary |= {"num_epochs": last, "seconds": ended.seconds}
        name = run_name(pair, ended.entry.configuration)
        config = self.plan.config(pair, ended.entry.params)
        self.runs.end(name, ended.status, summary, config=config)
        self.shown.end(pair, ended)
