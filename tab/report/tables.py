"""The ranked table of a comparison, for the terminal and report.md, from one list of columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table

from ..compare.csv_files import DISTURBED
from ..compare.runs import Run
from ..compare.verdicts import Verdict, verdicts
from ..layers import known_layer
from ..statistics import t_interval
from .text import plain


def title(attention: str) -> str:
    """The name to read: the layer's title; a layer without one, or that is not installed here,
    keeps the name that it was trained under."""
    layer = known_layer(attention)
    return (layer and layer.title) or attention


def name(attention: str) -> str:
    """`title` in Markdown."""
    return plain(title(attention))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and half the width of its 95 % interval (None with one seed)."""

    value: float
    half: float | None = None

    @classmethod
    def of(cls, values: list[float]) -> Mean | None:
        if not values:
            return None
        return cls.between(float(np.mean(values)), *(t_interval(values) or (None, None)))

    @classmethod
    def between(cls, value: float, low: float | None, high: float | None) -> Mean:
        return cls(value, None if low is None else (high - low) / 2)

    def show(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        half = "" if self.half is None else f" ± {self.half * scale:{form.lstrip('+')}}"
        return f"{self.value * scale:{form}}{half}{unit}"

    @property
    def spread(self) -> tuple[float, float]:
        """How far its bar reaches below and above."""
        return (self.half or 0.0,) * 2


@dataclass(frozen=True)
class Median:
    """A median over seeds, for times, with the least and the largest (None with one seed): what
    else the machine did during one run lengthens that run alone."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: list[float]) -> Median | None:
        if not values:
            return None
        ends = (min(values), max(values)) if len(values) > 1 else ()
        return cls(float(np.median(values)), *ends)

    def show(self, form: str, unit: str = "") -> str:
        ends = "" if self.low is None else f" ({self.low:{form}}–{self.high:{form}})"
        return f"{self.value:{form}}{unit}{ends}"

    @property
    def disturbed(self) -> bool:
        """Other work decided it, more than the mechanism."""
        return self.low is not None and self.high > DISTURBED * self.low

    @property
    def spread(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.low is None else (self.value - self.low, self.high - self.value)


@dataclass(frozen=True)
class Standing:
    """One mechanism on one model, over its seeds. Differences from control pair the seeds."""

    model: str
    attention: str
    runs: list[Run]  # those that ended with numbers
    notes: str  # "2 seeds", "diverged (s1)", "failed (s0)"
    test: Mean | None
    train: Mean | None
    seconds: Median | None
    points: Mean | None  # test accuracy - control's
    ratio: Median | None  # train time / control's
    rate: Median | None
    parameters: int | None
    flops: int | None
    memory: int | None
    verdict: Verdict | None  # None: no result
    rank: int = 0  # equals share one; 0: no result


def ranking(runs: list[Run], model: str) -> list[Standing]:
    """The model's entries, best mean test accuracy first; those without a result come last."""
    mine, found = [run for run in runs if run.model == model], verdicts(runs, model)
    control = {run.seed: run.summary for run in mine if run.attention == "none" and run.scored}
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


def _standing(runs: list[Run], control: dict[int, dict], found: Verdict | None) -> Standing:
    good = [run for run in runs if run.scored]
    paired = [(run.summary, control[run.seed]) for run in good if run.seed in control]

    def values(key: str) -> list[float]:
        return [run.summary[key] for run in good if run.summary.get(key) is not None]

    def first(key: str) -> int | None:
        return next(iter(values(key)), None)

    ratio, test, points = "total_training_time", None, None
    if found:
        test = Mean.between(found.accuracy_mean, found.accuracy_low, found.accuracy_high)
    if found and found.difference is not None:
        points = Mean.between(found.difference, found.difference_low, found.difference_high)
    compared = runs[0].attention != "none"
    return Standing(
        model=runs[0].model,
        attention=runs[0].attention,
        runs=good,
        notes=", ".join(f"{run.state} (seed {run.seed})" for run in runs if run not in good),
        test=test,
        train=Mean.of(values("final_train_accuracy")),
        seconds=Median.of(values("total_training_time")),
        points=points,
        ratio=Median.of([a[ratio] / b[ratio] for a, b in paired if b[ratio]]) if compared else None,
        rate=Median.of(values("images_per_second")),
        parameters=first("parameters"),
        flops=first("flops"),
        # On a CPU it is the whole process's peak so far: it says nothing of one run.
        memory=None if good and good[0].device == "cpu" else first("peak_memory_bytes"),
        verdict=found,
    )


# --- showing --------------------------------------------------------------------------------------


def count(n: float | None) -> str:
    """1234567 -> '1.23 M'"""
    if n is None:
        return "–"
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= limit:
            return f"{n / limit:.3g}{unit}"
    return f"{n:.0f}"


def seconds(median: Median) -> str:
    return marked(median, ".0f" if median.value >= 10 else ".2f", unit=" s")


def marked(median: Median, form: str, unit: str) -> str:
    """With a star where it was disturbed."""
    return median.show(form, unit) + " *" * median.disturbed


def versus(entry: Standing) -> str:
    if entry.attention == "none" and entry.test:
        return "baseline"
    return entry.points.show("+.1f", 100) if entry.points else "–"


def p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


WORDS = (  # columns of text, set left
    *("Model", "Attention", "Verdict", "Note", "No gradient", "Affine", "Noise"),
    *("Same function as", "Test accuracy", "Winner"),
)
COLUMNS: dict[str, Callable[[Standing], str]] = {
    "Rank": lambda e: str(e.rank or "–"),
    "Attention": lambda e: title(e.attention),
    "Test acc.": lambda e: e.test.show(".1f", 100, " %") if e.test else e.notes,
    "Train acc.": lambda e: e.train.show(".1f", 100, " %") if e.train else "–",
    "Train time": lambda e: seconds(e.seconds) if e.seconds else "–",
    "vs control": versus,
    "p (Holm)": lambda e: p_value(e.verdict and e.verdict.p_holm),
    "Verdict": lambda e: (e.verdict and e.verdict.verdict) or "–",
    "Time ratio": lambda e: marked(e.ratio, ".2f", "×") if e.ratio else "–",
    "Images/s": lambda e: count(e.rate.value) if e.rate else "–",
    "Parameters": lambda e: count(e.parameters),
    "FLOPs/image": lambda e: count(e.flops),
    "Peak memory": lambda e: "–" if e.memory is None else f"{e.memory / 2**20:.0f} MiB",
    "Note": lambda e: e.notes if e.test else "",
}


def cells(entries: list[Standing], leave_out: tuple[str, ...] = ()) -> tuple[list, list[list[str]]]:
    """Header and lines; a column that no entry fills is left out."""
    columns = {name: show for name, show in COLUMNS.items() if name not in leave_out}
    lines = [[show(entry) for show in columns.values()] for entry in entries]
    shown = [i for i in range(len(columns)) if any(line[i] not in ("–", "") for line in lines)]
    header = [*columns]
    return [header[i] for i in shown], [[line[i] for i in shown] for line in lines]


def markdown_table(entries: list[Standing]) -> str:
    header, lines = cells(entries)
    return markdown_lines(header, lines)


def markdown_lines(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---" if name in WORDS else "---:" for name in header]
    cells = [[plain(cell) for cell in line] for line in (header, *lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])


STATISTICS: dict[str, Callable[[Verdict], str]] = {
    "Attention": lambda v: title(v.attention),
    "Seeds": lambda v: str(v.seeds),
    "Test acc. (%)": lambda v: percent(v.accuracy_mean),
    "SD": lambda v: percent(v.accuracy_std),
    "95 %": lambda v: ends(v.accuracy_low, v.accuracy_high),
    "Difference": lambda v: percent(v.difference, "+"),
    "95 % ": lambda v: ends(v.difference_low, v.difference_high, "+"),
    "p": lambda v: p_value(v.p),
    "p (Holm)": lambda v: p_value(v.p_holm),
    "McNemar": lambda v: p_value(v.p_mcnemar),
    "Equivalence": lambda v: p_value(v.p_equivalent),
    "Verdict": lambda v: v.verdict or "–",
}


def statistics_table(entries: list[Standing]) -> str:
    """Of report.md: what each verdict rests on."""
    rows = [entry.verdict for entry in entries if entry.verdict]
    return markdown_lines([*STATISTICS], [[f(v) for f in STATISTICS.values()] for v in rows])


def percent(x: float | None, sign: str = "") -> str:
    return "–" if x is None else f"{100 * x:{sign}.2f}"


def ends(low: float | None, high: float | None, sign: str = "") -> str:
    return "–" if low is None else f"{percent(low, sign)} … {percent(high, sign)}"


def terminal_table(entries: list[Standing], caption: str) -> Table:
    header, lines = cells(entries, leave_out=("Images/s", "FLOPs/image", "Peak memory"))
    table = Table(title=caption, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name in WORDS else "right")
    for entry, line in zip(entries, lines, strict=True):
        control, best = entry.attention == "none", entry.rank == 1
        table.add_row(*line, style="bold" if best else "cyan" if control else None)
    return table
