"""The plan of a comparison and of a sweep, made of what the shell or Python gives: each name is
looked up, and stands in the plan as it is found again from anywhere."""

from __future__ import annotations

import dataclasses

from ..compare.plan import Grid, Plan
from ..recipe.names import STUDY, variants
from ..recipe.recipe import Recipe, load_recipe
from ..sweep.halving import named_budget
from ..sweep.plan import SweepPlan
from ..sweep.space import load_space
from .given import device_of, place_of


def comparison_plan(
    recipe: str,
    overrides: dict[str, object],
    models: str = STUDY,
    attentions: str = "all",
    **given: object,
) -> Plan:
    """recipe: a name or a file. given: as `grid_of` takes it."""
    found = load_recipe(recipe, overrides)
    return Plan(found, grid_of(found, models, attentions, **given))


def grid_of(
    recipe: Recipe,
    models: str | None,
    attentions: str | None,
    *,
    data: str,
    device: str | None,
    cluster: str | None = None,
    dashes: str = "--",
    **others: object,
) -> Grid:
    """others: fields of the grid. dashes: in front of the names of options in errors."""
    mine, layers = variants(models, attentions, recipe.attentions(), dashes=dashes)
    where = device_of(device, cluster=cluster)
    place = place_of(data)
    return Grid(recipe.name, mine, layers, data=place, device=where, **others)


def sweep_plan(
    recipe: str,
    overrides: dict[str, object],
    models: str | None,
    attentions: str | None,
    *,
    space: str,
    budget: str,
    changes: dict[str, object],
    data: str,
    device: str | None,
    cluster: str | None = None,
    dashes: str = "--",
    **others: object,
) -> SweepPlan:
    """overrides: of the recipe. changes: of the budget. others: fields of the plan."""
    mine, layers = variants(models, attentions, dashes=dashes)
    return SweepPlan(
        recipe=load_recipe(recipe, overrides),
        space=load_space(space),
        budget=dataclasses.replace(named_budget(budget), **changes),
        models=mine,
        attentions=layers,
        data=place_of(data),
        device=device_of(device, cluster=cluster),
        **others,
    )
