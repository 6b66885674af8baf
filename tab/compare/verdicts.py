"""Each mechanism of a comparison against the control: the numbers of a verdict, and its words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from .. import statistics as st

if TYPE_CHECKING:
    from .runs import Run

BETTER, WORSE = "better", "worse"
EQUIVALENT = f"equivalent within ±{100 * st.MARGIN:g}"
UNDECIDED, ONE_SEED, NO_PAIRS = "undecided", "one seed: no verdict", "no seed in common"


@dataclass(frozen=True)
class Verdict:
    """Of one mechanism on one model. Accuracies run from 0 to 1; None: there is nothing to say it
    from. p and p_equivalent are tests over seeds, and images where each run kept its answers;
    p_mcnemar is one over images."""

    model: str
    attention: str
    seeds: int
    pairs: int  # seeds in common with the control
    accuracy_mean: float
    accuracy_std: float | None = None
    accuracy_low: float | None = None  # the ends of 95 % intervals
    accuracy_high: float | None = None
    # "seeds and images": bootstrap of both, where each run kept its answers; else "seeds", by t
    interval_over: str = ""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None  # corrected over the mechanisms of this model
    p_mcnemar: float | None = None
    p_equivalent: float | None = None  # corrected too
    verdict: str = ""

    def columns(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if key in COLUMNS}


COLUMNS = [f.name for f in fields(Verdict) if f.name not in ("model", "attention", "seeds")]


def verdicts(runs: Sequence[Run], model: str) -> dict[str, Verdict]:
    """attention -> what its runs with a test accuracy say; mechanisms without such a run are left
    out."""
    mine: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.model == model and run.scored:
            mine.setdefault(run.attention, {})[run.seed] = run
    answers = _answers([run for group in mine.values() for run in group.values()])
    control = mine.get("none", {})
    found = {a: _one(model, a, group, control, answers) for a, group in mine.items()}
    others = [a for a in found if a != "none"]
    for field in ("p", "p_equivalent"):
        given = [getattr(found[a], field) for a in others]
        corrected = st.holm([math.nan if p is None else p for p in given])
        into = "p_holm" if field == "p" else field
        for a, p in zip(others, corrected, strict=True):
            found[a] = replace(found[a], **{into: None if math.isnan(p) else p})
    for a in others:
        found[a] = replace(found[a], verdict=words(found[a]))
    return found


def words(v: Verdict) -> str:
    """The verdict from p-values that are corrected already."""
    if v.pairs < 2:
        return ONE_SEED if v.pairs else NO_PAIRS
    alpha = 1 - st.LEVEL
    differs = v.p_holm is not None and v.p_holm <= alpha
    equal = v.p_equivalent is not None and v.p_equivalent <= alpha
    if differs:
        less = f", by less than {100 * st.MARGIN:g}" if equal else ""
        return (BETTER if v.difference > 0 else WORSE) + less
    return EQUIVALENT if equal else UNDECIDED


@dataclass(frozen=True)
class _Answers:
    right: np.ndarray  # (N,) bool
    resampled: np.ndarray  # (RESAMPLES,) accuracies, on the same draws of images for each run


@dataclass(frozen=True)
class _Table:
    right: np.ndarray  # (S, N)
    resampled: np.ndarray  # (RESAMPLES, S)

    @classmethod
    def of(cls, runs: list[_Answers]) -> _Table:
        columns = np.stack([run.resampled for run in runs], 1)
        return cls(np.stack([run.right for run in runs]), columns)


def _answers(runs: list[Run]) -> dict[str, _Answers]:
    """By run id, of the runs that kept theirs."""
    right = {run.id: found for run in runs if (found := run.right()) is not None}
    sizes = {len(found) for found in right.values()}
    if not right or len(sizes) > 1:  # runs on unequal test sets share no images
        return {}
    means = st.resampled_images(np.stack(list(right.values())))
    return {name: _Answers(right[name], means[:, i]) for i, name in enumerate(right)}


def _one(
    model: str,
    attention: str,
    group: dict[int, Run],
    control: dict[int, Run],
    answers: dict[str, _Answers],
) -> Verdict:
    mine = list(group.values())
    pairs = [(group[s], control[s]) for s in group if s in control and attention != "none"]
    have = all(run.id in answers for run in (*mine, *(c for _, c in pairs)))
    accuracies = [run.accuracy for run in mine]
    differences = [a.accuracy - b.accuracy for a, b in pairs]
    own = _Table.of([answers[run.id] for run in mine]) if have else None
    low, high = _interval(accuracies, own)
    found = Verdict(
        model=model,
        attention=attention,
        seeds=len(mine),
        pairs=len(pairs),
        accuracy_mean=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies, ddof=1)) if len(mine) > 1 else None,
        accuracy_low=low,
        accuracy_high=high,
        interval_over="" if low is None else "seeds and images" if have else "seeds",
    )
    if not pairs:
        return found
    moved, p_images, images = None, None, None
    if have:
        a, b = (_Table.of([answers[pair[i].id] for pair in pairs]) for i in (0, 1))
        moved = _Table(a.right.astype(float) - b.right, a.resampled - b.resampled)
        p_images = st.mcnemar_p(a.right, b.right)
        images = st.images_variance(moved.right) if len(pairs) > 1 else None
    low, high = _interval(differences, moved)
    return replace(
        found,
        difference=float(np.mean(differences)),
        difference_low=low,
        difference_high=high,
        p=_number(st.paired_p(differences, images or 0.0)),
        p_mcnemar=p_images,
        p_equivalent=_number(st.equivalence_p(differences, images)),
    )


def _interval(values: list[float], table: _Table | None) -> tuple:
    if len(values) < 2:
        return None, None
    if table is None:
        return st.t_interval(values)
    return st.bootstrap_interval(table.right, table.resampled)


def _number(p: float) -> float | None:
    return None if math.isnan(p) else p
