"""`tab compare --tune N`: the same search for every row, then the comparison with what it chose.

    OUT/tuning/    a sweep's directory: N configurations of each model and mechanism
    OUT/config.toml    from then on with the configuration that won for each of them

Common random numbers: configuration i has the same learning rate, weight decay and rate of the
gates in every row, so that rows differ by what they make of the draws and not by their luck with
them. All are trained to the end of their schedule, and the best on images held out from training is
chosen: as long as the rate of a one-cycle schedule is high, low ones lead that are behind at the
end (docs/results.md), so that successive halving would keep the wrong ones. The comparison trains
the winners anew, from other seeds, and only these meet the test images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..compare.plan import Grid, Plan
from ..data.load import Dataset
from ..recipe.recipe import Recipe, load_recipe
from ..sweep.driver import SweepWatcher, sweep
from ..sweep.halving import Budget
from ..sweep.plan import SweepPlan
from ..sweep.space import Space, load_space, with_chosen
from ..tasks.tasks import Executor

FOLDER = "tuning"
SEED = 1_000_000  # of draws and of runs: none that the comparison trains
VALIDATION = 5000  # images, unless the data set is small
FEWEST = 200  # batches an epoch that make a third of the images enough to choose by


def budget_of(plan: Plan, dataset: Dataset) -> Budget:
    """N configurations, on a third of the images where these are still FEWEST batches, for three
    times the draws."""
    config, count = plan.configs()[0], len(dataset.train)
    held = max(config.data.validation, min(VALIDATION, count // 10))
    third = (config.data.images or count - held) // 3
    few = third < FEWEST * config.train.batch_size
    images = config.data.images if few else third
    return Budget(plan.grid.tune, (config.train.epochs,), 2.0, images, held)  # one rung: no halving


def sweep_of(plan: Plan, dataset: Dataset, space: Space | None = None) -> SweepPlan:
    """The search before the comparison `plan`."""
    grid = plan.grid
    return SweepPlan(
        recipe=plan.recipe,
        space=space or load_space("tuning"),
        budget=budget_of(plan, dataset),
        models=grid.models,
        attentions=grid.attentions,
        data=grid.data,
        device=grid.device,
        seed=SEED,
        draws="common",
        plugins=grid.plugins,
    )


def tuned(
    plan: Plan,
    dataset: Dataset,
    out: Path,
    *,
    watcher: SweepWatcher | None = None,
    executor: Executor | None = None,
) -> Plan:
    """Searches what has not been searched yet in `out` (which `Plan.save` started); -> the
    comparison with each row's winner, which config.toml then holds.

    A ValueError: nothing of some row could be scored, so that it cannot be compared as tuned.
    """
    folder = out / FOLDER
    if (folder / "sweep.toml").exists():
        now = {"data": plan.grid.data, "plugins": plan.grid.plugins}
        search = dataclasses.replace(SweepPlan.load(folder), **now)
    else:
        search = sweep_of(plan, dataset)
        search.save(folder, dataset)
    best = sweep(search, dataset, folder, watcher=watcher, executor=executor)
    if lost := ["-".join(pair) for pair in search.pairs() if pair not in best]:
        raise ValueError(
            f"tuning scored no configuration of {', '.join(lost)}: see {folder / 'runs'}, or give "
            "--attentions without it"
        )
    recipe = plan.recipe
    for pair, ended in best.items():
        recipe = with_chosen(recipe, *pair, ended.entry.params)
    plan = dataclasses.replace(plan, recipe=recipe).for_classes(Grid.load(out).classes)
    plan.rewrite(out)
    return plan


def begun_with(out: Path, plan: Plan) -> Recipe:
    """The recipe that the comparison in `out` was begun with, before anything was chosen."""
    path = out / FOLDER / "recipe.toml"
    if not path.exists():
        return plan.recipe
    return dataclasses.replace(load_recipe(path.resolve()), name=plan.recipe.name)
