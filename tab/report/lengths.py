"""Accuracy, time and memory against N, the number of tokens: what comparisons and a run of `tab
bench steps` left, joined.

A comparison is of one N: the same data and recipe with model.vit.patch or model.tokens.tokens set
otherwise. Each line says how many seeds and epochs stand behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..bench.results import load
from ..bench.rows import Row, percentiles, row_speedup
from ..compare.csv_files import write_csv
from ..compare.plan import Grid
from ..compare.runs import Run, read_runs
from ..data.sequences import named
from ..train.run_files import read_config
from .averages import Mean
from .chart_data import looks
from .html import html_page
from .length_charts import HEADING, PANELS, length_groups
from .style import figure, label_ends, look
from .tables import markdown_lines
from .text import title

Key = tuple[str, str, int]  # model, attention, N


@dataclass(frozen=True)
class Trained:
    """The ended runs of one mechanism at one N."""

    data: str  # as the comparison names it
    tokens: int  # N
    runs: list[Run]

    @property
    def key(self) -> Key:
        return self.runs[0].model, self.runs[0].attention, self.tokens

    @property
    def task(self) -> bool:
        """Whether its data is a generated task, and no images."""
        return named(self.data)

    @property
    def accuracy(self) -> Mean:
        return Mean.of([run.accuracy for run in self.runs])


def trained(folders: Iterable[Path]) -> list[Trained]:
    """What these comparisons found; a ValueError if two hold the same mechanism, model, data and
    N, or none holds a run that has ended."""
    found: dict[tuple, tuple[Path, Trained]] = {}
    for folder in folders:
        grid = Grid.load(folder)
        mine: dict[tuple[str, str], list[Run]] = {}
        for run in read_runs(folder, grid):
            if run.counts:
                mine.setdefault((run.model, run.attention), []).append(run)
        for runs in mine.values():
            new = Trained(grid.data, read_config(runs[0].path).tokens, runs)
            name = (new.data, *new.key)
            if name in found:
                raise ValueError(
                    f"{found[name][0]} and {folder} both hold {new.key[1]} at "
                    f"{new.key[2]} tokens: give one of them"
                )
            found[name] = folder, new
    if not found:
        raise ValueError("no run of these comparisons has ended: resume them with tab compare")
    return [new for _, new in found.values()]


# --- what a step costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A training step, and that of the twin in plain PyTorch where there is one."""

    row: Row
    twin: Row | None

    def columns(self) -> dict[str, object]:
        found: dict[str, object] = {"batch": self.row.batch, **_times("step", self.row)}
        found["step_peak_mb"] = _megabytes(self.row)
        if self.twin:
            found |= _times("eager", self.twin)
            found["eager_peak_mb"] = _megabytes(self.twin)
            low, mid, high = row_speedup(self.twin, self.row, "step")
            found |= {"times_faster": mid, "times_faster_p10": low, "times_faster_p90": high}
        return found


def _times(name: str, row: Row) -> dict[str, float]:
    low, mid, high = (1e3 * t for t in percentiles(row.seconds["step"]))
    return {f"{name}_ms": mid, f"{name}_ms_p10": low, f"{name}_ms_p90": high}


def _megabytes(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 1e6


def costs(path: Path) -> dict[Key, Cost]:
    """Of a file of `tab bench steps --patch`; a ValueError if it knows no N."""
    rows = [row for row in load(path)[1] if row.tokens is not None and not row.skipped]
    if not rows:
        raise ValueError(f"{path} has no steps with their N: measure with tab bench steps --patch")
    known: dict[Key, dict[str, Row]] = {}
    for row in rows:
        who, _, attention = row.contestant.rpartition(" ")
        model = row.case.split("/")[1]
        known.setdefault((model, attention, row.tokens), {})[who or "tab"] = row
    return {key: Cost(by["tab"], by.get("eager")) for key, by in known.items() if "tab" in by}


# --- the table and the figure ---------------------------------------------------------------------

COLUMNS = ["model", "attention", "tokens", "seeds", "epochs", "accuracy", "accuracy_half"]
COLUMNS += ["batch", "step_ms", "step_ms_p10", "step_ms_p90", "step_peak_mb"]
COLUMNS += ["eager_ms", "eager_ms_p10", "eager_ms_p90", "eager_peak_mb"]
COLUMNS += ["times_faster", "times_faster_p10", "times_faster_p90"]


def joined(found: Iterable[Trained], cost: dict[Key, Cost]) -> list[dict]:
    """A line for each model, mechanism and N of either; what only the other knows is missing."""
    by = {each.key: each for each in found}
    order = list(dict.fromkeys(key[:2] for key in (*by, *cost)))  # as they come first, at any N
    lines = []
    for key in sorted({*by, *cost}, key=lambda key: (order.index(key[:2]), key[2])):
        line: dict[str, object] = dict(zip(("model", "attention", "tokens"), key, strict=True))
        if key in by:
            mean, runs = by[key].accuracy, by[key].runs
            line |= {"accuracy": mean.value, "accuracy_half": mean.half, "seeds": len(runs)}
            line |= {"epochs": by[key].runs[0].epochs}
        if key in cost:
            line |= cost[key].columns()
        lines.append(line)
    return lines


def write_lengths(out: Path, lines: list[dict]) -> list[Path]:
    """lengths.csv, .md, .png, .svg and .html of these lines (`joined`)."""
    paths = [files.folder(out) / f"lengths.{kind}" for kind in ("csv", "md", "png", "html")]
    write_csv(paths[0], COLUMNS, lines)
    table = _table(lines)
    files.write_text(paths[1], table + "\n")
    _picture(paths[2], lines)
    text = (
        f"# {HEADING}\n\n> Each line of the table says how many seeds and epochs stand behind it."
        "\n\n## Table\n\n"
    )
    names = looks(line["attention"] for line in lines)
    files.write_text(paths[3], html_page(text + table, names, length_groups(lines), {}, None))
    return paths


SHOWN = {  # heading -> columns, and how they are written
    "Seeds": ("{}", "seeds"),
    "Epochs": ("{}", "epochs"),
    "Test acc.": ("{:.1%}", "accuracy"),
    "Step (ms)": ("{:.1f} ({:.1f}–{:.1f})", "step_ms", "step_ms_p10", "step_ms_p90"),
    "Peak MB": ("{:.0f}", "step_peak_mb"),
    "PyTorch (ms)": ("{:.1f} ({:.1f}–{:.1f})", "eager_ms", "eager_ms_p10", "eager_ms_p90"),
    "Peak MB ": ("{:.0f}", "eager_peak_mb"),
    "Times faster": (
        *("{:.2f} ({:.2f}–{:.2f})", "times_faster", "times_faster_p10", "times_faster_p90"),
    ),
}


def _table(lines: list[dict]) -> str:
    def cell(line: dict, form: str, *names: str) -> str:
        values = [line.get(name) for name in names]
        return "–" if None in values else form.format(*values)

    shown = {k: v for k, v in SHOWN.items() if any(line.get(v[1]) is not None for line in lines)}
    cells = [
        [title(line["attention"]), str(line["tokens"]), *(cell(line, *s) for s in shown.values())]
        for line in lines
    ]
    return markdown_lines(["Attention", "N", *shown], cells)


def _picture(path: Path, lines: list[dict]) -> None:
    """A panel for each of accuracy, time and memory against N; thin dotted lines are the twins in
    plain PyTorch."""
    panels = [p for p in PANELS if any(line.get(p[0]) is not None for line in lines)]
    names = list(dict.fromkeys(line["attention"] for line in lines))
    ticks = sorted({line["tokens"] for line in lines})
    with figure(path, len(panels), columns=3, width=5.2, svg=True) as (_, axes):
        for ax, (column, twin, heading, unit, factor, log) in zip(axes, panels, strict=True):
            ends = []
            for name in names:
                style, mine = look(name, names), [x for x in lines if x["attention"] == name]
                for key, line in ((column, style), (twin, {**style, "linestyle": ":"})):
                    at = [(x["tokens"], factor * x[key]) for x in mine if x.get(key) is not None]
                    if at:
                        ax.plot(*zip(*at, strict=True), marker="o", markersize=3, **line)
                    if at and key == column:
                        ends.append((*at[-1], title(name), style))
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [str(n) for n in ticks])
            if log:
                ax.set_yscale("log")
            ax.set(title=heading, xlabel="tokens N", ylabel=unit)
            label_ends(ax, ends)
