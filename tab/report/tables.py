"""The ranking of a comparison, and its table in report.md and report.html."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from ..compare import columns
from ..compare.columns import Column
from ..compare.disturbance import LIMIT, disturbed
from ..compare.runs import Run
from ..compare.verdicts import Verdict, verdicts
from .averages import UNITS, Mean, Median, average, marked, shown
from .text import plain, title
from .unfinished import notes


def name(attention: str) -> str:
    """`title` in Markdown."""
    return plain(title(attention))


@dataclass(frozen=True)
class Standing:
    """One mechanism on one model, over its seeds. Differences from control pair the seeds."""

    model: str
    attention: str
    runs: list[Run] = field(repr=False)  # those that ended with numbers
    notes: str  # "2 seeds", "diverged (s1)", "failed (s0)"
    test: Mean | None
    points: Mean | None  # test accuracy - control's
    ratio: Median | None  # train time / control's
    # Of each metric with a title, by its name.
    averages: dict[str, Mean | Median | None] = field(repr=False)
    verdict: Verdict | None = field(repr=False)  # None: no result
    rank: int = 0  # equals share one; 0: no result

    @property
    def seconds(self) -> Median | None:
        return self.averages["total_training_time"]

    def value(self, metric: str) -> float | None:
        """Its average over the seeds."""
        found = self.averages[metric]
        return None if found is None else found.value


def ranking(runs: list[Run], model: str) -> list[Standing]:
    """The model's entries, best mean test accuracy first; those without a result come last."""
    mine, found = [run for run in runs if run.model == model], verdicts(runs, model)
    control = {run.seed: run for run in mine if run.attention == "none" and run.scored}
    entries = [
        _standing(
            [run for run in mine if run.attention == attention], control, found.get(attention)
        )
        for attention in dict.fromkeys(run.attention for run in mine)
    ]
    entries.sort(key=lambda e: -math.inf if e.test is None else e.test.value, reverse=True)
    scores = [entry.test.value for entry in entries if entry.test]
    return [
        replace(entry, rank=1 + sum(score > entry.test.value for score in scores))
        if entry.test
        else entry
        for entry in entries
    ]


def _standing(runs: list[Run], control: dict[int, Run], found: Verdict | None) -> Standing:
    good = [run for run in runs if run.scored]
    test, points = None, None
    if found:
        test = Mean.between(found.accuracy_mean, found.accuracy_low, found.accuracy_high)
    if found and found.difference is not None:
        points = Mean.between(found.difference, found.difference_low, found.difference_high)
    return Standing(
        model=runs[0].model,
        attention=runs[0].attention,
        runs=good,
        notes=notes(runs),
        test=test,
        points=points,
        ratio=_ratio(good, control) if runs[0].attention != "none" else None,
        averages={c.name: average(c, good) for c in columns.SUMMARY if c.title},
        verdict=found,
    )


def _ratio(runs: list[Run], control: dict[int, Run]) -> Median | None:
    """Of training times, seeds paired."""
    key = "total_training_time"
    pairs = [(run, c) for run in runs if (c := control.get(run.seed)) and c.summary[key]]
    ratios = [run.summary[key] / c.summary[key] for run, c in pairs]
    apart = len(ratios) > 1 and max(ratios) > LIMIT * min(ratios)
    return Median.of(ratios, apart or any(disturbed(mine) for mine in zip(*pairs, strict=True)))


# --- showing --------------------------------------------------------------------------------------


def versus(entry: Standing) -> str:
    if entry.attention == "none" and entry.test:
        return "baseline"
    return entry.points.show("+z.1f", 100) if entry.points else "–"


def p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


ARROWS = {"": "", "more": " ↑", "less": " ↓"}  # in a heading: which way is better
WORDS = (  # columns of text, set left
    *("Model", "Attention", "Verdict", "Best control", "Note", "No gradient"),
    *("Affine", "Noise", "Only a bias", "Tokens meet"),
    *("Same function as", "Test accuracy", "Winner", "Configuration"),
)
FIRST: dict[str, Callable[[Standing], str]] = {
    "Rank": lambda e: str(e.rank or "–"),
    "Attention": lambda e: title(e.attention),
    "Test acc. (%) ↑": lambda e: e.test.show(".1f", 100) if e.test else "–",
}
COMPARED: dict[str, Callable[[Standing], str]] = {
    "vs control (points) ↑": versus,
    "Verdict": lambda e: (e.verdict and e.verdict.verdict) or "–",
    "p (Dunnett)": lambda e: p_value(e.verdict and e.verdict.p_adjusted),
    "Time ratio (×) ↓": lambda e: marked(e.ratio, ".2f", "") if e.ratio else "–",
}
LAST: dict[str, Callable[[Standing], str]] = {"Note": lambda e: e.notes}


def ranked_columns() -> dict[str, Callable[[Standing], str]]:
    """Heading -> what stands below it; the metrics are those of compare/columns.py."""
    return answer_columns() | cost_columns()


def answer_columns() -> dict[str, Callable[[Standing], str]]:
    """Of the first table, which says what was found."""
    return FIRST | COMPARED | _metrics(lead=True) | LAST


def cost_columns() -> dict[str, Callable[[Standing], str]]:
    """Of the second, which says what it took."""
    return {"Attention": FIRST["Attention"]} | _metrics(lead=False)


def _metrics(lead: bool) -> dict[str, Callable[[Standing], str]]:
    found = [c for c in columns.SUMMARY if c.title and c.lead is lead]
    return {head(c): partial(_metric, c) for c in found}


def head(column: Column) -> str:
    """Of a metric: its title, unit, and the way that is better."""
    unit = f" ({UNITS[column.unit]})" if column.unit in UNITS else ""
    return f"{column.title}{unit}{ARROWS[column.better]}"


def _metric(column: Column, entry: Standing) -> str:
    return shown(entry.averages[column.name], column.unit, bare=True)


def cells(
    entries: list[Standing], shows: dict[str, Callable[[Standing], str]]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines; a column that no entry fills is left out."""
    lines = [[show(entry) for show in shows.values()] for entry in entries]
    filled = [i for i in range(len(shows)) if any(line[i] not in ("–", "") for line in lines)]
    header = [*shows]
    return [header[i] for i in filled], [[line[i] for i in filled] for line in lines]


def markdown_table(entries: list[Standing]) -> str:
    return markdown_lines(*cells(entries, answer_columns()))


def costs_table(entries: list[Standing]) -> str:
    """ "" where none of it is known."""
    header, lines = cells([entry for entry in entries if entry.test], cost_columns())
    return markdown_lines(header, lines) if len(header) > 1 else ""


def markdown_lines(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if name in WORDS else "---:" for name in header]
    cells = [[plain(cell) for cell in line] for line in (header, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


STATISTICS: dict[str, Callable[[Verdict], str]] = {
    "Attention": lambda v: title(v.attention),
    "Seeds": lambda v: str(v.seeds),
    "Test acc. (%) ↑": lambda v: percent(v.accuracy_mean),
    "SD (points)": lambda v: percent(v.accuracy_std),
    "95 % interval (%)": lambda v: ends(v.accuracy_low, v.accuracy_high),
    "vs control (points) ↑": lambda v: percent(v.difference, "+"),
    "95 % interval (points)": lambda v: ends(v.difference_low, v.difference_high, "+"),
    "Verdict": lambda v: v.verdict or "–",
    "p": lambda v: p_value(v.p),
    "p (Dunnett)": lambda v: p_value(v.p_adjusted),
    "p (McNemar)": lambda v: p_value(v.p_mcnemar),
    "p (equivalence)": lambda v: p_value(v.p_equivalent),
}
BEST_CONTROL: dict[str, Callable[[Verdict], str]] = {  # where several rows are no attention
    "Attention": lambda v: title(v.attention),
    "Best control": lambda v: title(v.best_control),
    "Above it (points) ↑": lambda v: percent(v.best_control_difference, "+"),
    "95 % interval (points)": lambda v: ends(v.best_control_low, v.best_control_high, "+"),
    "Verdict": lambda v: v.best_control_verdict or "–",
}


def statistics_table(entries: list[Standing]) -> str:
    """Of report.md: what each verdict rests on."""
    return _of_verdicts(STATISTICS, [entry.verdict for entry in entries if entry.verdict])


def best_control_table(entries: list[Standing]) -> str:
    """The same against the best row that is no attention; "" where there are not several."""
    found = [e.verdict for e in entries if e.verdict and e.verdict.best_control]
    return _of_verdicts(BEST_CONTROL, found) if found else ""


def _of_verdicts(shows: dict[str, Callable[[Verdict], str]], found: list[Verdict]) -> str:
    return markdown_lines([*shows], [[show(v) for show in shows.values()] for v in found])


def percent(x: float | None, sign: str = "") -> str:
    return "–" if x is None else f"{100 * x:{sign}.2f}"


def ends(low: float | None, high: float | None, sign: str = "") -> str:
    return "–" if low is None else f"{percent(low, sign)} … {percent(high, sign)}"
