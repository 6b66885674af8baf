"""Each mechanism of a comparison against the control, and each attention against the best control:
the numbers of a verdict, and its words. docs/statistics.md says how they come about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from .. import statistics as st
from ..recipe.names import is_attention, is_control_again

if TYPE_CHECKING:
    from .runs import Run

BETTER, WORSE = "better", "worse"
EQUIVALENT = f"equivalent within ±{100 * st.MARGIN:g}"
UNDECIDED, ONE_SEED = "undecided", "one seed: no verdict"
KINDS = ("better", "worse", "equivalent", "undecided")


@dataclass(frozen=True)
class Verdict:
    """Of one mechanism on one model. Accuracies run from 0 to 1; None: there is nothing to say it
    from. A run that diverged counts with the accuracy of chance.

    The intervals of `difference` hold together, over all mechanisms of the model (the control under
    a second name stands alone); so do those of `best_control_difference`. The verdicts are read off
    them and off nothing else.
    """

    model: str
    attention: str
    seeds: int
    pairs: int  # seeds in common with the control
    accuracy_mean: float
    accuracy_std: float | None = None
    accuracy_low: float | None = None  # the ends of 95 % intervals
    accuracy_high: float | None = None
    # "seeds and images" where each run kept its answers; else "seeds"
    interval_over: str = ""
    difference: float | None = None  # from the control
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None  # of no difference, by the same variance
    p_adjusted: float | None = None  # for all mechanisms of this model (Dunnett)
    p_mcnemar: float | None = None  # of these trained models alone
    p_equivalent: float | None = None  # adjusted: of a difference beyond ±MARGIN
    verdict: str = ""
    best_control: str = ""  # the best row that is no attention, where there are several
    best_control_difference: float | None = None
    best_control_low: float | None = None
    best_control_high: float | None = None
    best_control_verdict: str = ""

    def columns(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if key in COLUMNS}


COLUMNS = [f.name for f in fields(Verdict) if f.name not in ("model", "attention", "seeds")]


def verdicts(runs: Sequence[Run], model: str) -> dict[str, Verdict]:
    """attention -> what its runs that ended say; mechanisms without such a run are left out."""
    mine: dict[str, dict[int, Run]] = {}
    ended = [run for run in runs if run.model == model and run.counts]
    if any(run.scored for run in ended):  # else nothing was scored on the test set
        for run in ended:
            mine.setdefault(run.attention, {})[run.seed] = run
    samples = _samples(mine)
    found = {a: _alone(model, a, sample) for a, sample in samples.items()}
    again = {a: samples.pop(a) for a in [*samples] if is_control_again(a)}
    rows = {a: sample for a, sample in samples.items() if a != "none"}
    if "none" in samples:
        for family in (rows, *({a: sample} for a, sample in again.items())):
            found |= _against_control(found, family, samples["none"])
    controls = {a: sample for a, sample in samples.items() if not is_attention(a)}
    attentions = {a: sample for a, sample in samples.items() if a not in controls}
    if len(controls) > 1:
        found |= _against_best(found, attentions, controls)
    return found


def words(interval: tuple[float, float] | None, seeds: int) -> str:
    """The verdict that an interval of a difference is. seeds: of the side that has fewer."""
    if seeds < 2:
        return ONE_SEED
    if interval is None:
        return UNDECIDED
    low, high = interval
    equal = low > -st.MARGIN and high < st.MARGIN
    if low > 0 or high < 0:
        less = f", by less than {100 * st.MARGIN:g}" if equal else ""
        return (BETTER if low > 0 else WORSE) + less
    return EQUIVALENT if equal else UNDECIDED


def kind(verdict: str) -> str:
    """The one of KINDS that a verdict in words is; "" where one seed gave none."""
    first = verdict.split(" ")[0].rstrip(",")
    return first if first in KINDS else ""


def _samples(mine: dict[str, dict[int, Run]]) -> dict[str, st.Sample]:
    """Of each mechanism; with answers image by image where all of its runs kept them."""
    right = {run.id: run.right() for group in mine.values() for run in group.values()}
    kept = {id: found for id, found in right.items() if found is not None}
    if len({len(found) for found in kept.values()}) > 1:  # unequal test sets share no images
        kept = {}
    images = len(next(iter(kept.values()))) if kept else 0
    made = {}
    for attention, group in mine.items():
        answers = [
            np.full(images, run.accuracy) if run.diverged else kept.get(run.id)
            for run in group.values()
        ]
        have = images > 0 and all(each is not None for each in answers)
        made[attention] = st.Sample(
            seeds=tuple(run.seed if run.draws is None else run.draws for run in group.values()),
            accuracy=np.array([run.accuracy for run in group.values()]),
            right=np.stack(answers).astype(np.float32) if have else None,
            typical=not any(run.diverged for run in group.values()),
        )
    return made


def _alone(model: str, attention: str, sample: st.Sample) -> Verdict:
    several, found = len(sample.seeds) > 1, st.mean(sample)
    low, high = found.interval() or (None, None)
    over = "seeds" if sample.right is None else "seeds and images"
    return Verdict(
        model=model,
        attention=attention,
        seeds=len(sample.seeds),
        pairs=0,
        accuracy_mean=found.value,
        accuracy_std=float(sample.accuracy.std(ddof=1)) if several else None,
        accuracy_low=low,
        accuracy_high=high,
        interval_over="" if low is None else over,
    )


def _against_control(
    found: dict[str, Verdict], rows: dict[str, st.Sample], control: st.Sample
) -> dict[str, Verdict]:
    """The rows' verdicts, all of which are true with probability LEVEL."""
    family = st.Family.of(rows.values(), control)
    alpha, judged = family.alpha(), {}
    estimates = st.differences([*rows.values()], control)
    for (attention, row), estimate in zip(rows.items(), estimates, strict=True):
        interval = estimate.interval(alpha)
        low, high = interval or (None, None)
        common = [s for s in row.seeds if s in control.seeds]
        p, room = estimate.p(), st.MARGIN - abs(estimate.value)
        judged[attention] = replace(
            found[attention],
            pairs=len(common),
            difference=estimate.value,
            difference_low=low,
            difference_high=high,
            p=_number(p),
            p_adjusted=_number(family.adjusted(p)),
            p_mcnemar=_mcnemar(row, control, common),
            p_equivalent=_number(family.adjusted(estimate.p(room))),
            verdict=words(interval, min(len(row.seeds), len(control.seeds))),
        )
    return judged


def _mcnemar(row: st.Sample, control: st.Sample, common: list[int]) -> float | None:
    if row.right is None or control.right is None or not common:
        return None
    a, b = (s.right[[s.seeds.index(seed) for seed in common]] for s in (row, control))
    return st.mcnemar_p(a, b)


def _against_best(
    found: dict[str, Verdict], rows: dict[str, st.Sample], controls: dict[str, st.Sample]
) -> dict[str, Verdict]:
    """The attentions' verdicts against the best control, whichever that truly is."""
    names, judged = [*controls], {}
    fewest = min(len(control.seeds) for control in controls.values())
    above = st.above_best([*rows.values()], [*controls.values()])
    for (attention, row), (least, value, interval) in zip(rows.items(), above, strict=True):
        low, high = interval or (None, None)
        judged[attention] = replace(
            found[attention],
            best_control=names[least],
            best_control_difference=value,
            best_control_low=low,
            best_control_high=high,
            best_control_verdict=words(interval, min(len(row.seeds), fewest)),
        )
    return judged


def _number(p: float) -> float | None:
    return None if math.isnan(p) else p
