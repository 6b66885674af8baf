"""A result in pictures: each contestant's speed over the best rival's, memory and its growth.

A bar says how many times as fast as the best rival a contestant is, in the same rounds, on a
logarithmic axis on which that rival stands at 1×: what wins goes right, what loses left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import decode_chart
from .peak_memory import growth, tokens
from .rows import DIRECTIONS, Row, percentiles, row_speedup

OURS, THEIRS = "#0072B2", "#E69F00"  # Okabe & Ito: told apart by everyone, and in grey
_OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#882255", "#7A7A7A")
SAID = {"forward": "forward", "backward": "backward", "both": "forward + backward", "step": "step"}


@dataclass(frozen=True)
class Bar:
    """Of one contestant: times as fast as the best rival, with the 10th and 90th percentile."""

    name: str
    ours: bool
    value: float
    low: float
    high: float
    ms: float


@dataclass(frozen=True)
class Bars:
    """Of one case and direction."""

    title: str
    rival: str  # what stands at 1×
    bars: list[Bar]


def is_ours(name: str) -> bool:
    return name.split()[0] == "tab"


def speeds(rows: Iterable[Row]) -> list[Bars]:
    """For each case in the direction that says most: "both" where it was timed. Cases without a
    rival are left out."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds and not row.skipped:
            cases.setdefault(row.case, []).append(row)
    found = (_steps(c, g) if "step" in g[0].seconds else _ops(c, g) for c, g in cases.items())
    return [bars for bars in found if bars]


def _ops(case: str, rows: list[Row]) -> Bars | None:
    direction = next((d for d in reversed(DIRECTIONS) if d in rows[0].seconds), None)
    timed = [row for row in rows if direction in row.seconds]
    rivals = [row for row in timed if not is_ours(row.contestant)]
    if not rivals or len(rivals) == len(timed):
        return None
    best = min(rivals, key=lambda row: percentiles(row.seconds[direction])[1])
    bars = [_bar(row.contestant, row, best, direction) for row in timed]
    return Bars(f"{case}, {SAID[direction]}", best.contestant, bars)


def _steps(case: str, rows: list[Row]) -> Bars | None:
    """Whole training steps: each mechanism against its own twin in plain PyTorch."""
    by = {row.contestant: row for row in rows}
    pairs = {name.removeprefix("tab "): row for name, row in by.items() if is_ours(name)}
    bars = [
        _bar(name, row, twin, "step")
        for name, row in pairs.items()
        if (twin := by.get(f"eager {name}"))
    ]
    return Bars(f"{case}, training step", "its twin in plain PyTorch", bars) if bars else None


def _bar(name: str, row: Row, best: Row, direction: str) -> Bar:
    low, value, high = (1.0,) * 3 if row is best else row_speedup(best, row, direction)
    ms = 1e3 * percentiles(row.seconds[direction])[1]
    return Bar(name, is_ours(row.contestant), value, low, high, ms)


# --- memory ---------------------------------------------------------------------------------------


def memory(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """op -> contestant, with the exponent of its growth -> (N, peak MB), of `tab bench memory`."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        op, size = (*row.case.split("/"), "")[:2]
        if row.peak_bytes and not row.skipped and size.startswith("n") and size[1:].isdigit():
            found.setdefault(op, {}).setdefault(row.contestant, []).append(row)
    return {
        op: {
            _growing(name, mine): sorted((tokens(r), r.peak_bytes / 1e6) for r in mine)
            for name, mine in of.items()
        }
        for op, of in found.items()
        if any(len(mine) > 1 for mine in of.values())
    }


def _growing(name: str, rows: list[Row]) -> str:
    exponent = growth(rows)
    return name if exponent is None else f"{name}, N^{exponent:.2f}"


def colours(names: Iterable[str]) -> dict[str, str]:
    """Ours in blue, the others in what is told apart from it."""
    names = list(names)
    others = [name for name in names if not is_ours(name.split(",")[0])]
    return {
        name: OURS if name not in others else _OTHERS[others.index(name) % len(_OTHERS)]
        for name in names
    }


# --- for a page -----------------------------------------------------------------------------------


def charts(rows: list[Row]) -> list[dict]:
    """What bars.js and curves.js draw."""
    decoding = [row for row in rows if row.held_bytes]
    rows = [row for row in rows if not row.held_bytes]
    drawn = [
        {
            "kind": "bars",
            "title": bars.title,
            "rival": bars.rival,
            "colours": [OURS, THEIRS],
            "bars": [asdict(bar) for bar in bars.bars],
        }
        for bars in speeds(rows)
    ]
    for op, of in memory(rows).items():
        hue = colours(of)
        series = [
            {
                "key": name,
                "x": [n for n, _ in points],
                "y": [float(f"{mb:.5g}") for _, mb in points],
                "dots": True,
                "look": {"name": name, "color": hue[name], "width": 2, "dash": ""},
            }
            for name, points in of.items()
        ]
        drawn.append(
            {
                **{"kind": "curves", "title": f"{op}: peak memory, forward + backward"},
                **{"xlabel": "tokens N", "ylabel": "MB", "xlog": True, "ylog": True},
                "xat": sorted({n for points in of.values() for n, _ in points}),
                **{"shared": False, "named": True, "series": series},
            }
        )
    return [*drawn, *decode_chart.charts(decoding)]


# --- as a file ------------------------------------------------------------------------------------


def picture(rows: list[Row], path: Path) -> None:
    """The bars as PNG, a panel for each case; no file where nothing has a rival."""
    from ..drawing.figures import Picture  # what only measures needs no matplotlib

    found = speeds(rows)
    if not found:
        return
    heights = [0.7 + 0.34 * len(bars.bars) for bars in found]
    figure = Picture(figsize=(8, 0.6 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, bars in zip(axes, found, strict=True):
        _draw_bars(axis, bars)
    figure.keep(path, dpi=110)


def _draw_bars(axis, bars: Bars) -> None:
    values = [bar.value for bar in bars.bars]
    hues = [OURS if bar.ours else THEIRS for bar in bars.bars]
    places = range(len(values))
    axis.set_xscale("log")
    axis.barh(places, [v - 1 for v in values], left=1, color=hues, height=0.66)
    spread = [[b.value - b.low for b in bars.bars], [b.high - b.value for b in bars.bars]]
    axis.errorbar(values, places, xerr=spread, fmt="none", ecolor="#555555", lw=1)
    axis.axvline(1, color="#1b1b1b", lw=1)
    least = min(1, *(b.low for b in bars.bars))
    most = max(1, *(b.high for b in bars.bars))
    axis.set_xlim(least / 1.4, most * (most / least) ** 0.35 * 1.5)
    for y, bar in enumerate(bars.bars):
        text = f"  {bar.value:.3g}×, {bar.ms:.3g} ms"
        weight = "bold" if bar.ours else "normal"
        axis.text(max(bar.high, 1), y, text, va="center", fontsize=8, weight=weight)
    axis.set_yticks(places, [bar.name for bar in bars.bars], fontsize=9)
    low, high = axis.get_xlim()
    ticks = [k * 10**e for e in range(-3, 5) for k in (1, 2, 5) if low <= k * 10**e <= high]
    ticks = [t for t in ticks if f"{t:e}"[0] == "1"] if len(ticks) > 7 else ticks
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks], fontsize=8)
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(bars.title, loc="left", fontsize=10)
    axis.set_xlabel(f"times as fast as {bars.rival} (log)", fontsize=8)
