"""`tab sweep`: successive halving for each (model, attention), with nothing trained twice.

    DIR/
        recipe.toml  space.toml  sweep.toml  environment.json   written first: enough to resume
        study.journal                                           unless in PostgreSQL; record.py
        runs/<model>-<attention>-c<number>/                     one a configuration; training_run.py
        trials.csv  winners.toml  halving.png

A configuration that goes on continues from its checkpoint, in its own folder. It is one run of
train(), stopped at each rung: the recipe's learning-rate schedule is laid over the budget of the
last rung, so that all configurations of a rung stand at the same point of it, and those that reach
the top have had the whole of the schedule that `tab compare` will give the winner.

Choices rest on validation images alone (evaluate.split = "validation_only"). All draws and
promotions happen at barriers, from values, so that neither the number of workers nor a kill changes
what is drawn, trained or chosen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..data.load import Dataset, loader
from ..files import locked, shown, write_text
from ..files.formats import write_toml
from ..recipe.recipe import Recipe
from ..run_config import RunConfig
from ..tasks.tasks import Executor, Shared, Task, run_tasks
from ..train.facts import DISK, made_with
from ..train.loop import plugin_of, train
from ..train.training_run import Outcome
from .halving import Bracket, brackets, promote, winner
from .plan import SweepPlan, name_of
from .record import Ended, Entry, PairRecord, seed_of
from .space import possible, with_chosen
from .storage import opened
from .trials import Pair, RungTrial, write_trials


class SweepWatcher:
    """Told what happens; this one keeps silent."""

    def step(self, bracket: Bracket, rung: int, entries: list[tuple[Pair, Entry]]) -> None:
        """Before the tasks of a step; those that ended before a stop are not among them."""

    def epoch(self, pair: Pair, entry: Entry, row: dict) -> None:
        """After an epoch."""

    def end(self, pair: Pair, ended: Ended) -> None:
        """After a configuration's rung, however it ended."""


def sweep(
    plan: SweepPlan,
    dataset: Dataset,
    out: Path,
    *,
    watcher: SweepWatcher | None = None,
    executor: Executor | None = None,
) -> dict[Pair, Ended]:
    """Runs what of `plan` has not ended in `out` (which `SweepPlan.save` started); -> the winners.

    An exception, or a loss that is not finite, ends its own configuration. A disk that fails ends
    the sweep, which can be resumed. A mechanism whose plugin is another one than `out` says starts
    anew.
    """
    made_with(out, dataset)
    kept = SweepPlan.load(out)
    plan = replace(plan, classes=kept.classes)
    with locked(out), records(plan, out, mine=True) as found:
        for record in found.values():
            record.recover()
        if plan.plugins != kept.plugins:
            before = {each["sha256"] for each in kept.plugins}
            for pair, record in found.items():
                now = plugin_of(plan.config(pair, {}))
                if now and now["sha256"] not in before:
                    record.anew()
            plan.keep_plugins(out)
        shared = Shared(dataset.fingerprint, loader(dataset, plan.data))
        shared.put(dataset)
        driver = _Driver(plan, out, found, shared, watcher, executor)
        for bracket in brackets(plan.budget, plan.brackets):
            driver.run(bracket)
        best = winners(found)
        write_results(out, found)
        write_toml(out / "winners.toml", recipe_of(plan, best, out).tables)
    return best


@contextlib.contextmanager
def records(plan: SweepPlan, out: Path, *, mine: bool = False) -> Iterator[dict[Pair, PairRecord]]:
    """Each pair's record. mine: for the one that drives; others may only read."""
    name, path = name_of(out), out / "study.journal"
    studies = [
        (f"{name}/{model}-{attention}", plan.space.axes(model, attention))
        for model, attention in plan.pairs()
    ]
    with opened(plan.storage, path, name, mine=mine) as storage:
        yield {
            pair: PairRecord.open(storage, *study, mine=mine)
            for pair, study in zip(plan.pairs(), studies, strict=True)
        }


def winners(found: dict[Pair, PairRecord]) -> dict[Pair, Ended]:
    """Of each pair what `winner` takes; a pair of which nothing was scored is left out."""
    ends = {pair: record.ended() for pair, record in found.items()}
    best = {
        pair: winner({key: end.score for key, end in ended.items()}) for pair, ended in ends.items()
    }
    return {pair: ends[pair][key] for pair, key in best.items() if key is not None}


def recipe_of(plan: SweepPlan, best: dict[Pair, Ended], out: Path) -> Recipe:
    """The sweep's recipe with what won for each pair."""
    recipe = plan.recipe
    for pair, ended in best.items():
        recipe = with_chosen(recipe, *pair, ended.entry.params)
    name = shown(out.resolve().name)
    title = f"Winners of the sweep {name}, on {plan.data}, over {plan.recipe.name}"
    return Recipe("winners", {**recipe.tables, "title": title})


def write_results(out: Path, found: dict[Pair, PairRecord]) -> dict[Pair, list[RungTrial]]:
    """trials.csv, as far as there are trials. -> these"""
    trials = {pair: record.trials() for pair, record in found.items()}
    drawn = dict.fromkeys(name for record in found.values() for name in record.axes)
    write_trials(out / "trials.csv", trials, drawn)
    return trials


# --- the coordinator ------------------------------------------------------------------------------


class _Driver:
    """Walks through the steps of a sweep. Each is a function of what ended in the steps before: one
    that had been done already finds nothing left to do, so that resuming is walking again."""

    def __init__(
        self,
        plan: SweepPlan,
        out: Path,
        found: dict[Pair, PairRecord],
        shared: Shared[Dataset],
        watcher: SweepWatcher | None,
        executor: Executor | None,
    ):
        self.plan, self.out, self.records, self.shared = plan, out, found, shared
        self.watcher, self.executor = watcher or SweepWatcher(), executor
        self.count = dict.fromkeys(found, 0)  # configurations drawn so far

    def run(self, bracket: Bracket) -> None:
        epochs, sampler = self.plan.budget.epochs, self.plan.sampler
        drawn: dict[Pair, dict[int, dict]] = {pair: {} for pair in self.records}
        # TPE learns from what was trained: it draws in four batches, each after the one before.
        batch = bracket.configurations
        batch = batch if sampler == "random" else math.ceil(batch / 4)
        step = 0
        for start in range(0, bracket.configurations, batch):
            count = min(batch, bracket.configurations - start)
            entries = []
            for pair, record in self.records.items():
                new = record.draw(
                    count,
                    lambda chosen, pair=pair: possible(self.plan.config(pair, chosen)),
                    sampler=sampler,
                    seed=seed_of(self.plan.seed, *self._whose(pair), bracket.number, step),
                    step=(bracket.number, step),
                )
                if not new and not self.count[pair]:
                    raise ValueError(f"no configuration of {pair} in the space can be built")
                for params in new:
                    number = self.count[pair]
                    self.count[pair] += 1
                    drawn[pair][number] = params
                    at = (bracket.number, step, bracket.first, epochs[bracket.first])
                    entries.append((pair, Entry(number, *at, "", params)))
            self._step(bracket, bracket.first, entries)
            step += 1
        for rung in range(bracket.first + 1, len(epochs)):
            entries = []
            for pair, params in drawn.items():
                size = bracket.sizes(self.plan.budget, len(params))[rung - bracket.first]
                ended = self.records[pair].ended()
                below = {n: end.score for (n, r), end in ended.items() if r == rung - 1}
                chosen = promote({n: below[n] for n in params if n in below}, size)
                for n in chosen:
                    parent = str(self._folder(pair, n) / "checkpoint.pt")
                    at = (bracket.number, step, rung, epochs[rung])
                    entries.append((pair, Entry(n, *at, parent, params[n])))
            self._step(bracket, rung, entries)
            step += 1
            for pair, params in drawn.items():
                going = {entry.configuration for other, entry in entries if other == pair}
                for n in set(params) - going:  # large, and nothing will continue from it
                    (self.out / self._folder(pair, n) / "checkpoint.pt").unlink(missing_ok=True)

    def _whose(self, pair: Pair) -> Pair | tuple[()]:
        """Whose draws they are; common ones are nobody's."""
        return () if self.plan.draws == "common" else pair

    def _step(self, bracket: Bracket, rung: int, entries: list[tuple[Pair, Entry]]) -> None:
        """Trains what of `entries` has not ended, and tells each end."""
        ended = {pair: record.ended() for pair, record in self.records.items()}
        todo = [(p, e) for p, e in entries if (e.configuration, e.rung) not in ended[p]]
        for pair, entry in todo:
            self.records[pair].enqueue(entry)
        self.watcher.step(bracket, rung, todo)
        tasks = [
            Task(
                train_rung,
                (self.plan.config(pair, entry.params), self.shared, entry.epochs, self.plan.device),
                self.out / self._folder(pair, entry.configuration),
            )
            for pair, entry in todo
        ]
        trouble: list[Exception] = []
        told = partial(self._tell, todo, trouble)
        for done in run_tasks(tasks, self.executor, told):
            pair, entry = todo[done.index]
            if isinstance(done.error, OSError) and done.error.errno in DISK:
                trouble.append(done.error)
            if trouble:  # no fault of the configuration: it stays to be done
                raise trouble[0]
            if done.error:
                path = tasks[done.index].folder / "error.txt"
                path.parent.mkdir(parents=True, exist_ok=True)  # if its process never began
                write_text(path, done.traceback)
                last = done.traceback.strip().splitlines()[-1]
                end = Ended(entry, "failed", None, {}, 0.0, last)
            else:
                end = self._ended(entry, done.value)
            self.records[pair].tell(end, last=rung == len(self.plan.budget.epochs) - 1)
            self.watcher.end(pair, end)

    def _tell(self, todo: list[tuple[Pair, Entry]], trouble: list, index: int, row) -> None:
        pair, entry = todo[index]
        try:
            if row is None:
                self.records[pair].begin(entry)
            else:
                self.watcher.epoch(pair, entry, row)
        except Exception as error:  # an executor's events must not raise
            trouble.append(error)

    def _ended(self, entry: Entry, outcome: Outcome) -> Ended:
        """From the rows of this rung: the folder may hold more of them only after a fault."""
        epochs = self.plan.budget.epochs
        before = epochs[entry.rung - 1] if entry.parent else 0
        rows = [row for row in outcome.rows if before < row["epoch"] <= entry.epochs]
        curve = {row["epoch"]: row["validation_accuracy"] for row in rows}
        seconds = sum(row["seconds"] for row in rows)
        if outcome.status == "diverged":
            return Ended(entry, "diverged", None, curve, seconds)
        return Ended(entry, "done", curve[entry.epochs], curve, seconds)

    def _folder(self, pair: Pair, configuration: int) -> Path:
        """Below the sweep's directory, which can be moved."""
        return Path("runs") / run_name(pair, configuration)


def run_name(pair: Pair, configuration: int) -> str:
    """What a configuration's run is called, and its directory."""
    return f"{pair[0]}-{pair[1]}-c{configuration:03}"


def train_rung(
    config: RunConfig, dataset: Shared[Dataset], epochs: int, device: str, *, folder: Path, emit
) -> Outcome:
    """Continues the run in `folder` until it has that many epochs in all."""
    (folder / "error.txt").unlink(missing_ok=True)
    emit(None)
    return train(
        config, dataset.get(), folder, device=device, resume=True, on_epoch=emit, stop_after=epochs
    )
