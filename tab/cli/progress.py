"""What a comparison shows while it runs: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..compare.driver import Watcher
from ..compare.runs import Run
from ..run_config import RunConfig
from .terminal import console, live, say


def watcher() -> AbstractContextManager[Watcher]:
    """What fits: bars on a terminal, lines in a log, nothing where --quiet is given."""
    if console.quiet:
        return contextlib.nullcontext(Watcher())
    return Bars() if live() else contextlib.nullcontext(Lines())


def accuracies(row: dict) -> str:
    """'train 55.1 %, test 50.2 %' of what this epoch measured."""
    parts = [(part, row[f"{part}_accuracy"]) for part in ("train", "validation", "test")]
    return ", ".join(f"{part} {value:.1%}" for part, value in parts if value is not None)


def latest(row: dict) -> str:
    """'test 50.2 %': the last of `accuracies`."""
    return accuracies(row).rpartition(", ")[2]


def ended(run: Run) -> str:
    """One line about a run's end."""
    if run.status == "failed":
        return f"{run.id} failed: {run.error.strip().splitlines()[-1]}"
    seconds = run.summary["total_training_time"] or 0.0
    rate = run.summary["images_per_second"] or 0.0
    scores = accuracies(run.rows[-1]) if run.rows else ""
    return f"{run.id} {run.status}: {scores}, {seconds:.1f} s, {rate:,.0f} images/s"


class Lines(Watcher):
    """One line an epoch and one a run."""

    def __init__(self):
        self.count = 0

    def start(self, runs: int, epochs: int) -> None:
        self.runs, self.epochs = runs, epochs

    def begin(self, config: RunConfig) -> None:
        self.count += 1
        say(f"[{self.count}/{self.runs}] {config.id}")

    def epoch(self, config: RunConfig, row: dict) -> None:
        text = f"  {config.id}  epoch {row['epoch']}/{self.epochs}  loss {row['train_loss']:.4f}  "
        text += f"{accuracies(row)}  {row['seconds']:.1f} s"
        say(text)

    def end(self, run: Run) -> None:
        say(ended(run), style="red" if run.status != "done" else None)


class Bars(Watcher):
    """A bar over all epochs of the grid, one for each run at work; use it as a context."""

    def __init__(self, to: Console = console):
        name, note = Column(overflow="fold"), Column(overflow="fold")  # never cut
        self.progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False, table_column=note),
            console=to,
        )

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def start(self, runs: int, epochs: int) -> None:
        self.runs, self.epochs, self.bars = runs, epochs, {}
        self.done = {}  # epochs, by run
        self.grid = self.progress.add_task("epochs", total=runs * epochs, note=f"{runs} runs")

    def begin(self, config: RunConfig) -> None:
        if config.id not in self.bars:  # else it begins again, where another process died
            self.bars[config.id] = self.progress.add_task(config.id, total=self.epochs, note="")
        self._show(config.id, 0)

    def epoch(self, config: RunConfig, row: dict) -> None:
        bar = self.bars[config.id]
        self.progress.update(bar, completed=row["epoch"], note=latest(row))
        self._show(config.id, row["epoch"])

    def end(self, run: Run) -> None:
        if run.id in self.bars:
            self.progress.remove_task(self.bars.pop(run.id))
        self._show(run.id, self.epochs)
        style = "red" if run.status != "done" else None
        self.progress.console.print(ended(run), style=style)

    def _show(self, run: str, epochs: int) -> None:
        self.done[run] = max(epochs, self.done.get(run, 0))
        note = f"{len(self.done)} of {self.runs} runs"
        self.progress.update(self.grid, completed=sum(self.done.values()), note=note)
