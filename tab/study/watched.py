"""A comparison or a sweep whose runs are logged to other programs as well (tab/tracking/)."""

from __future__ import annotations

from ..compare.driver import Watcher
from ..compare.runs import Run
from ..sweep.driver import SweepWatcher, run_name
from ..sweep.halving import Bracket
from ..sweep.plan import SweepPlan
from ..sweep.record import Ended, Entry
from ..sweep.trials import Pair
from ..tracking import Watchers


class WatchedComparison(Watcher):
    """Tells `runs` of each run, and all of it to `shown`."""

    def __init__(self, runs: Watchers, shown: Watcher | None = None):
        self.runs, self.shown = runs, shown or Watcher()
        self.configs = {}  # of the runs that began, by name

    def start(self, runs: int, epochs: int) -> None:
        self.shown.start(runs, epochs)

    def begin(self, config) -> None:
        self.configs[config.id] = config
        self.shown.begin(config)

    def epoch(self, config, row: dict) -> None:
        self.runs.epoch(config.id, config, row)
        self.shown.epoch(config, row)

    def end(self, run: Run) -> None:
        config = self.configs.get(run.id) if run.status == "failed" else None
        self.runs.end(run.id, run.status, run.summary, config=config)
        self.shown.end(run)


class WatchedSweep(SweepWatcher):
    """Tells `runs` of each configuration, whose rungs are pieces of one run, and all of it to
    `shown`."""

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
