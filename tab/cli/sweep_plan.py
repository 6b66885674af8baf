"""The plan of `tab sweep`: made of the options, or read from where a sweep goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..study.given import place_of


def plan_of(wishes: dict, data: str, storage: str, cluster: str | None, plugins: list[dict]):
    from ..recipe.recipe import parse_override
    from ..study.plans import sweep_plan

    keys = ("configurations", "eta", "images", "validation")
    changes = {key: wishes[key] for key in keys if key in wishes}
    if "epochs" in wishes:
        changes["epochs"] = _numbers(wishes["epochs"])
    return sweep_plan(
        wishes.get("recipe", "fair"),
        dict(map(parse_override, wishes.get("set", []))),
        wishes.get("models"),
        wishes.get("attentions"),
        space=wishes.get("space", "published"),
        budget=wishes.get("budget", "published"),
        changes=changes,
        data=data,
        device=wishes.get("device"),
        cluster=cluster,
        seed=wishes.get("seed", 0),
        sampler=wishes.get("sampler", "random"),
        brackets=wishes.get("brackets", 1),
        storage=storage,
        plugins=plugins,
    )


def resumed(resume: Path, wishes: dict, data: str | None, storage: str | None):
    from ..sweep.plan import SweepPlan

    if wishes:
        names = ", ".join(f"--{name}" for name in wishes)
        raise ValueError(f"{resume} goes on as it was started: drop {names}, or start a new one")
    plan = with_storage(SweepPlan.load(resume), storage)
    return dataclasses.replace(plan, data=place_of(data)) if data else plan


def kept_plugins(out: Path):
    """What `use_plugins` wants to know of a sweep that is there."""
    from ..compare.plan import results_of
    from ..sweep.plan import SweepPlan

    return SweepPlan.plugins_of(out), results_of(out)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--epochs {text!r}: give whole numbers, such as 3,5,7") from None


def with_storage(plan, storage: str | None):
    """The plan with the storage as given, which may add a password but name no other place."""
    from ..sweep.storage import without_password

    if storage is None:
        return plan
    if not plan.storage or without_password(storage) != plan.storage:
        where = plan.storage or "its journal file"
        raise ValueError(f"this sweep is stored in {where}: give that, or drop --storage")
    return dataclasses.replace(plan, storage=storage)
