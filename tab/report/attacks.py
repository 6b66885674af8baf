"""Accuracy under PGD against ε: a table, a verdict where ε tells mechanisms apart, and curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..analysis.attacks import EPSILONS, STEPS, still_right
from ..compare.runs import Run
from ..compare.verdicts import words
from ..statistics import Family, Sample, differences
from .pictures import curves
from .tables import markdown_lines
from .text import title

Found = dict[str, dict]  # robustness.json of one run
SIZES = [f"{255 * epsilon:.4g}" for epsilon in EPSILONS]  # in 255ths


def attack_table(mine: list[tuple[Run, Found]]) -> str:
    """Of the runs of one model; "" if none was attacked at all ε."""
    groups: dict[str, list[tuple[int, dict]]] = {}
    for run, found in mine:
        if "pgd" in found:
            draws = run.seed if run.draws is None else run.draws  # what pairs with the control
            groups.setdefault(run.attention, []).append((draws, found["pgd"]))
    if not groups:
        return ""
    means = {a: np.mean([s["accuracy"] for _, s in group], 0) for a, group in groups.items()}
    told = _verdicts(groups, means)
    header = ["Attention", *(f"ε {size}/255" for size in SIZES)]
    if told:
        header.append(f"from the control at ε {SIZES[_telling(means['none'])]}/255")
    lines = [
        [title(a), *(f"{100 * x:.1f}" for x in accuracies), *([told.get(a, "–")] if told else [])]
        for a, accuracies in means.items()
    ]
    counts = sorted({section["images"] for group in groups.values() for _, section in group})
    images = " or ".join(f"{n:,}" for n in counts)
    text = f"Accuracy in per cent on {images} test images under PGD-{STEPS} (L∞, pixel space, "
    text += "α = ε/4), means over seeds."
    if told:
        text += " The difference is taken at the ε where the control is nearest to half of its "
        text += "accuracy at the smallest; the intervals hold together over all mechanisms."
    return markdown_lines(header, lines) + "\n\n" + text


def _telling(control: np.ndarray) -> int:
    """Chosen by the control alone, so that no mechanism gains by the choice."""
    return int(np.abs(control - control[0] / 2).argmin())


def _verdicts(
    groups: dict[str, list[tuple[int, dict]]], means: dict[str, np.ndarray]
) -> dict[str, str]:
    """mechanism -> its difference from the control, interval and verdict."""
    if "none" not in groups or len({s["images"] for g in groups.values() for _, s in g}) > 1:
        return {}
    j = _telling(means["none"])
    samples = {a: _sample(group, j) for a, group in groups.items()}
    control = samples.pop("none")
    alpha = Family.of(samples.values(), control).alpha()
    told = {}
    for a, estimate in zip(samples, differences([*samples.values()], control), strict=True):
        interval = estimate.interval(alpha)
        text = f"{100 * estimate.value:+z.1f}"
        if interval:
            text += f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
        told[a] = f"{text} {words(interval, min(len(samples[a].seeds), len(control.seeds)))}"
    return told


def _sample(group: list[tuple[int, dict]], j: int) -> Sample:
    right = np.stack([still_right(section)[j] for _, section in group]).astype(np.float32)
    return Sample(
        seeds=tuple(seed for seed, _ in group), accuracy=right.mean(1), right=right, typical=True
    )


def attack_points(found: dict[str, Found]) -> Callable[[Run], tuple[list, list]] | None:
    """What `curves` draws; None if nothing was measured."""
    measured = {i: f["pgd"]["accuracy"] for i, f in found.items() if "pgd" in f}
    if not measured:
        return None
    at = [255 * epsilon for epsilon in EPSILONS]

    def points(run: Run) -> tuple[list, list]:
        return (at, [100 * x for x in measured[run.id]]) if run.id in measured else ([], [])

    return points


def attack_picture(path: Path, runs: list[Run], found: dict[str, Found]) -> str:
    """-> its caption, "" if nothing was measured."""
    points = attack_points(found)
    if points is None:
        return ""
    mine = [run for run in runs if points(run)[0]]
    labels = {"heading": f"PGD-{STEPS}", "xlabel": "ε (255ths)", "ylabel": "test accuracy (%)"}
    curves(path, mine, points, **labels)
    return f"Test accuracy under PGD-{STEPS} against ε"
