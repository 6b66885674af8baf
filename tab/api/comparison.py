"""`tab.compare`, and a comparison's directory as an object."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from ..cli.given import load_data
from ..cli.tables import ranked_rows
from ..compare.driver import compare as run_all
from ..compare.plan import Grid, Plan, plugins_of, results_of
from ..compare.runs import Run, read_runs
from ..compare.verdicts import COLUMNS
from ..drawing.figures import Picture
from ..report import write_report
from ..report.forest import forest_picture
from ..report.pictures import bars
from ..report.tables import Standing, ranking
from ..study.given import place_of, say_mended, use_plugins
from ..study.plans import STUDY, comparison_plan
from ..study.tuned import FOLDER, sweep_of, tuned
from ..study.watched import WatchedComparison, WatchedSweep
from ..study.watching import watched, watchers
from ..tasks.choose import executor as executor_of
from ..tasks.tasks import Executor
from .given import changed, joined
from .result import Result, drawn
from .rows import Rows
from .told import Tell, ToldRungs, ToldRuns, silent

SHOWN = {
    **{"model": "model", "title": "attention", "accuracy_mean": "test %"},
    **{"difference": "vs control", "difference_low": "from", "difference_high": "to"},
    **{"verdict": "verdict", "time_ratio": "time ×", "notes": "note"},
}
STARRED = {"time_ratio": "time_disturbed"}
PERCENT = ("accuracy_mean", "difference", "difference_low", "difference_high")


def compare(
    attentions: str | Iterable[str] = "all",
    models: str | Iterable[str] = STUDY,
    *,
    recipe: str | Path = "fair",
    data: str | Path = "cifar10",
    seeds: int = 1,
    control_seeds: int = 0,
    tune: int = 0,
    epochs: int | None = None,
    overrides: Mapping[str, object] | None = None,
    batch_seeds: int = 1,
    out: str | Path | None = None,
    device: str | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    tell: Tell | None = print,
    watch: Iterable[str] = (),
    plugins: Iterable[str | Path] = (),
) -> Comparison:
    """Trains every model with every attention, and compares them: `tab compare` of the shell.

    attentions, models: names, in a list or separated by commas; "all" stands for those of the
        recipe, "ladder" for the controls. "none" is the control that the others are compared with.
    recipe: a name or a .toml file. epochs and overrides ({"train.lr": 0.01}) change it.
    data: "cifar10", "shapes", "shapes:TRAIN/TEST", "recall", "copy", "needle", a folder or archive.
    seeds: runs of each variant. control_seeds: of the control; 0: as many.
    tune: configurations that are tried for every row before; 0: each is trained as the recipe says.
    batch_seeds: seeds of a variant that are trained at once, as one stacked model.
    out: a new directory; by default one in results/, named after the time.
    device: "cpu", "cuda" or "cuda:1"; by default a GPU if there is one.
    jobs: runs at once, each in a process of its own. executor: in its place where they run, such as
        tab.tasks.choose.executor(ray="local").
    tell: gets a line for each run that ended; None: silence. watch: names of programs that every
        epoch is logged to, such as "tensorboard" and "wandb".
    plugins: files or modules that register attentions of your own. One that a notebook registers
        itself is known to its own process alone: it needs jobs=1.

    A run that fails is told of in a warning and has a note in the summary. What was stopped goes on
    with `tab.load_study(out).resume()`. Raises ValueError: an unknown name or option, or a
    directory that holds a comparison.

    >>> few = {"data.images": 200, "data.validation": 50, "train.batch_size": 50}
    >>> found = tab.compare(
    ...     ["none", "linear"], "mlp", recipe="quick", data="shapes:300/60", epochs=1, seeds=2,
    ...     overrides=few, tell=None,
    ... )
    >>> list(found.summary["attention"]) == [run.attention for run in found.ranked("mlp")]
    True
    >>> len(found.runs), (found.directory / "experiment_summary.csv").exists()
    (4, True)
    >>> found.plot().savefig("forest.png")
    """
    changes = changed(overrides)
    if epochs is not None and changes.setdefault("train.epochs", epochs) != epochs:
        raise ValueError(f"epochs={epochs} and overrides disagree: give one")
    records = use_plugins([*map(str, plugins)])
    plan = comparison_plan(
        str(recipe),
        changes,
        joined(models),
        joined(attentions),
        seeds=seeds,
        data=str(data),
        device=device,
        batch_seeds=batch_seeds,
        control_seeds=control_seeds,
        tune=tune,
        plugins=records,
        dashes="",
    )
    plan.configs()  # every name and option is checked before anything is fetched or written
    watched(watch)
    executor = executor or executor_of(jobs)
    dataset = load_data(plan.grid.data, plan.recipe.data())
    if tune:
        sweep_of(plan, dataset).check()
    place = plan.save(Path(out) if out else None, dataset)
    return Comparison(place).resume(executor=executor, tell=tell, watch=watch)


class Comparison(Result):
    """The directory of a comparison, finished or not, also of one that the shell began.

    directory: its path. grid: which runs it holds. runs: these, as they are on disk.
    """

    directory: Path

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.grid = Grid.load(self.directory)
        kept, results = plugins_of(self.directory), results_of(self.directory)
        self._plugins = use_plugins(None, kept, results)

    @cached_property
    def runs(self) -> list[Run]:
        """Each with its model, attention, seed, status, path, summary, and rows of epochs.
        `tab.load_model(run.path)` is its model."""
        return read_runs(self.directory, self.grid)

    def ranked(self, model: str) -> list[Standing]:
        """The mechanisms on this model, the best mean test accuracy first."""
        if model not in self.grid.models:
            raise ValueError(f"model {model!r}: this comparison has {', '.join(self.grid.models)}")
        return ranking(self.runs, model)

    def resume(
        self,
        *,
        data: str | Path | None = None,
        jobs: int = 1,
        executor: Executor | None = None,
        tell: Tell | None = print,
        watch: Iterable[str] = (),
    ) -> Comparison:
        """Runs what has not ended. data: where the data is now, if it has moved; else as `compare`.
        -> itself"""
        plan, out, say = Plan.load(self.directory), self.directory, tell or silent
        where = place_of(str(data or plan.grid.data))
        dataset = load_data(where, plan.recipe.data(), kept=not data)
        if data:
            plan = dataclasses.replace(plan, grid=dataclasses.replace(plan.grid, data=where))
            plan.moved(out, dataset)
        say_mended(plan.grid.plugins, self._plugins, say)
        plan = plan.with_plugins(out, self._plugins)
        executor, kinds = executor or executor_of(jobs), watched(watch)
        say(f"{out}: {len(plan.grid.cells())} runs on {dataset.note}")
        try:
            if plan.grid.tune:
                search, told = sweep_of(plan, dataset), ToldRungs(say)
                study = f"{out.resolve().name}/{FOLDER}"
                with watchers(kinds, out / FOLDER, study, failed=say) as others:
                    watcher = WatchedSweep(search, others, told)
                    plan = tuned(plan, dataset, out, watcher=watcher, executor=executor)
            with watchers(kinds, out, failed=say) as others:
                watcher = WatchedComparison(others, ToldRuns(say))
                runs = run_all(plan, dataset, out, watcher=watcher, executor=executor)
        except KeyboardInterrupt:
            say(f"stopped; go on with tab.load_study({str(out)!r}).resume()")
            raise
        if failed := [run.id for run in runs if run.status == "failed"]:
            text = f"failed: {', '.join(failed)}; error.txt of each, in {out / 'runs'}, says why"
            warnings.warn(text, stacklevel=2)
        return Comparison(out)

    def report(self, *, bench: str | Path | None = None, sweep: str | Path | None = None) -> Path:
        """Writes report.html, report.md and the pictures into the directory, as the shell does at
        the end of a comparison; -> the path of report.html. bench: a folder with JSON of `bench`.
        sweep: the directory of a sweep to show."""
        plan = Plan.load(self.directory)
        dataset = load_data(plan.grid.data, plan.recipe.data(), kept=True)
        more = {"bench": Path(bench) if bench else None, "sweep": Path(sweep) if sweep else None}
        return write_report(self.directory, dataset, **more).with_suffix(".html")

    def rows(self) -> Rows:
        """One for each model and attention: accuracies from 0 to 1, the verdict and what it rests
        on, and means over the seeds (docs/output-files.md has every name)."""
        lines = [row for model in self.grid.models for row in ranked_rows(self.ranked(model))]
        found = [{**dict.fromkeys(COLUMNS), **row} for row in lines]  # unjudged rows have them too
        shown = SHOWN if any(row["notes"] for row in found) else {**SHOWN, "notes": ""}
        heads = {key: head for key, head in shown.items() if head}
        return Rows(found, heads, percent=PERCENT, starred=STARRED)

    def headline(self) -> str:
        done = sum(run.status == "done" for run in self.runs)
        return f"{self.directory}: {done} of {len(self.runs)} runs done, on {self.grid.data}"

    def plot(self, model: str | None = None) -> Picture:
        """The differences from the control with their intervals, verdicts and times; without a
        control the final accuracies and times. model: by default the first."""
        model = model or self.grid.models[0]
        entries = [entry for entry in self.ranked(model) if entry.test]

        def draw(path: Path) -> None:
            if not forest_picture(path, model, entries) and entries:
                bars(path, entries, model.upper())

        return drawn(draw)
