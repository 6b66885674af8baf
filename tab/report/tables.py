"""The ranked table of a comparison, for the terminal and report.md, from one list of columns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table

from ..results import Run

TITLES = {
    "none": "Control",
    "self": "Self-Attention",
    "multi_head": "Multi-Head",
    "linear": "Linear",
    "performer": "Performer",
    "linformer": "Linformer",
    "sparse": "Sparse",
    "local": "Local",
    "kv_compression": "KV Compression",
    "deepseek_mla": "DeepSeek MLA",
    "kimi_k2": "Kimi K2",
    "flex": "Flex",
}


def title(attention: str) -> str:
    """The name to read; a mechanism from elsewhere keeps its own."""
    return TITLES.get(attention, attention)


def student_t(df: int, p: float = 0.975) -> float:
    """The p-quantile of Student's t, by its density under t = √df·tan θ: ∝ cos^(df-1) θ."""
    theta = np.linspace(-math.pi / 2, math.pi / 2, 100_001)
    density = np.cos(theta).clip(0) ** (df - 1)
    steps = (density[1:] + density[:-1]) / 2
    cdf = np.concatenate([[0.0], steps.cumsum()]) / steps.sum()
    return math.sqrt(df) * math.tan(np.interp(p, cdf, theta))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and the half width of its 95 % t-interval (None with one seed)."""

    value: float
    half: float | None = None

    @classmethod
    def of(cls, values: list[float]) -> Mean | None:
        if not values:
            return None
        half = None
        if (n := len(values)) > 1:
            half = student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        return cls(float(np.mean(values)), half)

    def show(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        half = "" if self.half is None else f" ± {self.half * scale:{form.lstrip('+')}}"
        return f"{self.value * scale:{form}}{half}{unit}"


@dataclass(frozen=True)
class Entry:
    """One mechanism on one model, over its seeds. Differences from control pair the seeds."""

    model: str
    attention: str
    runs: list[Run]  # those that ended with numbers
    notes: str  # "2 seeds", "diverged (s1)", "failed (s0)"
    test: Mean | None
    train: Mean | None
    seconds: Mean | None
    points: Mean | None  # test accuracy - control's
    ratio: Mean | None  # train time / control's
    rate: Mean | None
    parameters: int | None
    flops: int | None
    memory: int | None
    rank: int = 0  # equals share one; 0: no result


def ranking(runs: list[Run], model: str) -> list[Entry]:
    """The model's entries, best mean test accuracy first; those without a result come last."""
    mine = [run for run in runs if run.model == model]
    control = {run.seed: run.summary for run in mine if run.attention == "none" and usable(run)}
    entries = [
        _entry(model, attention, [run for run in mine if run.attention == attention], control)
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


def usable(run: Run) -> bool:
    return run.status == "done" and run.summary.get("final_test_accuracy") is not None


def _entry(model: str, attention: str, runs: list[Run], control: dict[int, dict]) -> Entry:
    good = [run for run in runs if usable(run)]
    paired = [(run.summary, control[run.seed]) for run in good if run.seed in control]

    def mean(key: str) -> Mean | None:
        return Mean.of([run.summary[key] for run in good if run.summary.get(key) is not None])

    def first(key: str) -> int | None:
        return next((run.summary[key] for run in good if run.summary.get(key) is not None), None)

    difference, ratio = "final_test_accuracy", "total_training_time"
    compared = attention != "none"
    return Entry(
        model=model,
        attention=attention,
        runs=good,
        notes=", ".join(f"{run.status} (seed {run.seed})" for run in runs if run not in good),
        test=mean("final_test_accuracy"),
        train=mean("final_train_accuracy"),
        seconds=mean("total_training_time"),
        points=Mean.of([a[difference] - b[difference] for a, b in paired]) if compared else None,
        ratio=Mean.of([a[ratio] / b[ratio] for a, b in paired if b[ratio]]) if compared else None,
        rate=mean("images_per_second"),
        parameters=first("parameters"),
        flops=first("flops"),
        # On a CPU it is the whole process's peak so far: it says nothing of one run.
        memory=None if good and good[0].device == "cpu" else first("peak_memory_bytes"),
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


def seconds(mean: Mean) -> str:
    return mean.show(".0f" if mean.value >= 10 else ".2f", unit=" s")


def versus(entry: Entry) -> str:
    if entry.attention == "none" and entry.test:
        return "baseline"
    return entry.points.show("+.1f", 100) if entry.points else "–"


COLUMNS: dict[str, Callable[[Entry], str]] = {
    "Rank": lambda e: str(e.rank or "–"),
    "Attention": lambda e: title(e.attention),
    "Test acc.": lambda e: e.test.show(".1f", 100, " %") if e.test else e.notes,
    "Train acc.": lambda e: e.train.show(".1f", 100, " %") if e.train else "–",
    "Train time": lambda e: seconds(e.seconds) if e.seconds else "–",
    "vs control": versus,
    "Time ratio": lambda e: e.ratio.show(".2f", unit="×") if e.ratio else "–",
    "Images/s": lambda e: count(e.rate.value) if e.rate else "–",
    "Parameters": lambda e: count(e.parameters),
    "FLOPs/image": lambda e: count(e.flops),
    "Peak memory": lambda e: "–" if e.memory is None else f"{e.memory / 2**20:.0f} MiB",
    "Note": lambda e: e.notes if e.test else "",
}


def cells(entries: list[Entry], leave_out: tuple[str, ...] = ()) -> tuple[list, list[list[str]]]:
    """Header and lines; a column that no entry fills is left out."""
    columns = {name: show for name, show in COLUMNS.items() if name not in leave_out}
    lines = [[show(entry) for show in columns.values()] for entry in entries]
    shown = [i for i in range(len(columns)) if any(line[i] not in ("–", "") for line in lines)]
    header = [*columns]
    return [header[i] for i in shown], [[line[i] for i in shown] for line in lines]


def markdown_table(entries: list[Entry]) -> str:
    header, lines = cells(entries)
    rule = ["---" if name in ("Attention", "Note") else "---:" for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def terminal_table(entries: list[Entry], caption: str) -> Table:
    header, lines = cells(entries, leave_out=("FLOPs/image", "Peak memory"))
    table = Table(title=caption, title_justify="left", title_style="bold")
    for name in header:
        table.add_column(name, justify="left" if name in ("Attention", "Note") else "right")
    for entry, line in zip(entries, lines, strict=True):
        control, best = entry.attention == "none", entry.rank == 1
        table.add_row(*line, style="bold" if best else "cyan" if control else None)
    return table
