"""`tab.sweep`, and a sweep's directory as an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from ..cli.given import load_data
from ..compare.plan import results_of
from ..drawing.figures import Picture
from ..report.sweep import halving_picture
from ..report.text import title
from ..study.given import place_of, say_mended, use_plugins
from ..study.plans import STUDY, sweep_plan
from ..study.watched import WatchedSweep
from ..study.watching import watched, watchers
from ..sweep.driver import sweep as run_all
from ..sweep.plan import SweepPlan
from ..sweep.trials import Pair, RungTrial, read_trials, winner_of
from ..tasks.choose import executor as executor_of
from ..tasks.tasks import Executor
from .given import changed, joined
from .result import Result, drawn
from .rows import Rows
from .told import Tell, ToldRungs, silent


def sweep(
    attentions: str | Iterable[str] = "all",
    models: str | Iterable[str] = STUDY,
    *,
    recipe: str | Path = "fair",
    space: str | Path = "published",
    budget: str = "published",
    configurations: int | None = None,
    epochs: Sequence[int] | None = None,
    eta: float | None = None,
    images: int | None = None,
    validation: int | None = None,
    brackets: int = 1,
    sampler: str = "random",
    seed: int = 0,
    storage: str = "",
    data: str | Path = "cifar10",
    overrides: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    jobs: int = 1,
    executor: Executor | None = None,
    tell: Tell | None = print,
    watch: Iterable[str] = (),
    plugins: Iterable[str | Path] = (),
) -> Sweep:
    """Finds hyperparameters for each model and attention by successive halving: `tab sweep` of the
    shell. It needs the extra `sweep` (Optuna).

    space: "published", "small", "tuning" or a .toml file. budget: "quick", "published", "medium" or
        "large", of which configurations (drawn for each pair), epochs (at which the rungs end), eta
        (the best 1/η go on), images (of the training set; 0: all) and validation (images held out
        to choose by) can be changed.
    brackets: Hyperband's; 1 is plain halving. sampler: "random" or "tpe". seed: of the draws, the
        weights and the batches. storage: "postgresql://…"; by default a file in the directory.
    All others are those of `compare`.

    Raises ValueError: an unknown name or option, or a directory that holds a sweep.

    >>> found = tab.sweep(
    ...     "self", "mlp", recipe="quick", space="tuning", data="shapes:300/60", configurations=2,
    ...     epochs=(1, 2), eta=2, images=100, validation=50, tell=None,
    ... )
    >>> found.summary["configurations"].tolist(), found.winners.name
    ([2], 'winners.toml')
    >>> found.plot().savefig("halving.png")
    """
    wished = {"configurations": configurations, "eta": eta, "images": images}
    wished |= {"validation": validation, "epochs": tuple(epochs) if epochs else None}
    changes = {key: value for key, value in wished.items() if value is not None}
    records = use_plugins([*map(str, plugins)])
    plan = sweep_plan(
        str(recipe),
        changed(overrides),
        joined(models),
        joined(attentions),
        space=str(space),
        budget=budget,
        changes=changes,
        data=str(data),
        device=device,
        dashes="",
        seed=seed,
        sampler=sampler,
        brackets=brackets,
        storage=storage,
        plugins=records,
    )
    plan.check()
    watched(watch)
    executor = executor or executor_of(jobs)
    dataset = load_data(plan.data, plan.recipe.data())
    place = plan.save(Path(out) if out else None, dataset)
    found = Sweep(place)
    found.plan = dataclasses.replace(found.plan, storage=storage)  # its password is on no disk
    return found.resume(executor=executor, tell=tell, watch=watch)


class Sweep(Result):
    """The directory of a sweep that ended, also of one that the shell ran.

    directory: its path. plan: what it was to do. trials: (model, attention) -> what was trained and
    scored, a configuration at a rung each.
    """

    directory: Path

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        kept, results = SweepPlan.plugins_of(self.directory), results_of(self.directory)
        self._plugins = use_plugins(None, kept, results)
        self.plan = SweepPlan.load(self.directory)

    @cached_property
    def trials(self) -> dict[Pair, list[RungTrial]]:
        """As trials.csv has them."""
        return read_trials(self.directory)

    @property
    def winners(self) -> Path:
        """The recipe with each pair's winner, for `tab.compare(recipe=…)`."""
        return self.directory / "winners.toml"

    def resume(
        self,
        *,
        data: str | Path | None = None,
        jobs: int = 1,
        executor: Executor | None = None,
        tell: Tell | None = print,
        watch: Iterable[str] = (),
    ) -> Sweep:
        """Runs what has not ended. data: where the data is now, if it has moved; else as `sweep`.
        -> itself"""
        plan, out, say = self.plan, self.directory, tell or silent
        where = place_of(str(data or plan.data))
        dataset = load_data(where, plan.recipe.data(), kept=not data)
        if data:
            plan = dataclasses.replace(plan, data=where)
            plan.moved(out, dataset)
        say_mended(plan.plugins, self._plugins, say)
        plan = dataclasses.replace(plan, plugins=self._plugins)
        say(f"{out}: {len(plan.pairs())} × {plan.budget.configurations} configurations")
        try:
            with watchers(watched(watch), out, failed=say) as others:
                watcher = WatchedSweep(plan, others, ToldRungs(say))
                run_all(plan, dataset, out, watcher=watcher, executor=executor or executor_of(jobs))
        except KeyboardInterrupt:
            say(f"stopped; go on with tab.load_study({str(out)!r}).resume()")
            raise
        return Sweep(out)

    def rows(self) -> Rows:
        """One for each model and attention: how many configurations were drawn, how many diverged
        or failed, the winner's validation accuracy (0 to 1) and what was drawn for it; None where
        nothing could be scored."""
        drawn_ = dict.fromkeys(k for ts in self.trials.values() for t in ts for k in t.params)
        found = []
        for (model, attention), trials in self.trials.items():
            won = winner_of(trials)
            row = {"model": model, "attention": attention, "title": title(attention)}
            row["configurations"] = len({t.configuration for t in trials})
            for status in ("diverged", "failed"):
                row[status] = sum(t.status == status for t in trials)
            row["configuration"] = won.configuration if won else None
            row["epochs"] = won.epochs if won else None
            row["validation_accuracy"] = won.score if won else None
            found.append(row | {name: won.params.get(name) if won else None for name in drawn_})
        return Rows(found, {key: key for key in (found[0] if found else ()) if key != "attention"})

    def headline(self) -> str:
        epochs = ", ".join(map(str, self.plan.budget.epochs))
        return f"{self.directory}: successive halving at epochs {epochs}, on {self.plan.data}"

    def plot(self) -> Picture:
        """A panel for each model and attention: validation accuracy by epoch, a line for each
        configuration, the winner's in colour."""
        rungs = self.plan.budget.epochs
        return drawn(lambda path: halving_picture(path, self.trials, rungs))
