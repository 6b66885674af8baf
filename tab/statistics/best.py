"""Rows against the best of several controls, whichever of them that truly is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .difference import Sample, differences
from .estimate import LEVEL
from .family import Family


class Above(NamedTuple):
    """A row against the best control."""

    control: int  # which of them the row is least above
    value: float  # by how much
    interval: tuple[float, float] | None  # None with a single seed of it or of a control


def above_best(rows: Sequence[Sample], controls: Sequence[Sample]) -> list[Above]:
    """For each row an interval of mean accuracy − the best control's; all hold together.

    Better than the best is better than each: an intersection–union test (Berger 1982), so the lower
    end is the least of those against each control, without correction for how many there are.
    Worse than the best is worse than any: the upper end is the least of theirs, corrected for it.
    That the best one seen is chosen from the data thus costs nothing in the one direction, and is
    paid for in the other.
    """
    found, ends = [[] for _ in rows], [[] for _ in rows]
    for control in controls:
        family = Family.of(rows, control)
        alpha, strict = family.alpha(), family.alpha((1 - LEVEL) / len(controls))
        for i, estimate in enumerate(differences(rows, control)):
            found[i].append(estimate.value)
            if estimate.known:
                ends[i].append((estimate.interval(alpha)[0], estimate.interval(strict)[1]))
    return [
        Above(
            control=min(range(len(controls)), key=values.__getitem__),
            value=min(values),
            interval=tuple(map(min, zip(*each, strict=True)))
            if len(each) == len(controls)
            else None,
        )
        for values, each in zip(found, ends, strict=True)
    ]
