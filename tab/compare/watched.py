"""A comparison whose runs are watched by other programs as well (tab/tracking/)."""

from __future__ import annotations

from ..run_config import RunConfig
from ..tracking import Watchers
from .driver import Watcher
from .runs import Run


class WatchedComparison(Watcher):
    """Tells `runs` of each run, and all of it to `shown`."""

    def __init__(self, runs: Watchers, shown: Watcher | None = None):
        self.runs, self.shown = runs, shown or Watcher()
        self.configs: dict[str, RunConfig] = {}

    def start(self, runs: int, epochs: int) -> None:
        self.shown.start(runs, epochs)

    def begin(self, config: RunConfig) -> None:
        self.configs[config.id] = config
        self.shown.begin(config)

    def epoch(self, config: RunConfig, row: dict) -> None:
        self.runs.epoch(config.id, config, row)
        self.shown.epoch(config, row)

    def end(self, run: Run) -> None:
        config = self.configs.get(run.id) if run.status == "failed" else None
        self.runs.end(run.id, run.status, run.summary, config=config)
        self.shown.end(run)
