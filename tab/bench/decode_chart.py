"""Tokens a second against the tokens before, a curve for each contestant of `tab bench decode`:
TAB's caches drawn through, what is plain PyTorch dashed in the colour of its mechanism."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from .rows import Row

_HUES = {
    "kv": "#7A7A7A",
    "linear": "#0072B2",
    "gated": "#999933",
    "performer": "#009E73",
    "local": "#E69F00",
    "sparse": "#D55E00",
    "h2o": "#CC79A7",
    "mla": "#56B4E9",
    "pages": "#882255",
}


def curves(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Sizes and precision -> contestant -> (tokens before, tokens a second), ascending."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.skipped or not row.seconds:
            continue
        _, _, *sizes = row.case.split("/")
        rate = row.batch / statistics.median(row.seconds["forward"])
        mine = found.setdefault(" ".join(sizes), {}).setdefault(row.contestant, [])
        mine.append((row.tokens, rate))
    return {sizes: {k: sorted(v) for k, v in of.items()} for sizes, of in found.items()}


def look(name: str) -> tuple[str, bool]:
    """Its colour, and whether it is dashed."""
    word = "kv" if name == "sdpa" else name.split()[-1]
    return _HUES[word], not name.startswith("tab ")


def charts(rows: Iterable[Row]) -> list[dict]:
    """What curves.js draws, for each choice of sizes."""
    drawn = []
    for sizes, of in curves(rows).items():
        series = []
        for name, points in of.items():
            colour, dashed = look(name)
            shown = {"name": name, "color": colour, "width": 2, "dash": "5 4" if dashed else ""}
            x, y = zip(*points, strict=True)
            rates = [float(f"{rate:.5g}") for rate in y]
            series.append({"key": name, "x": x, "y": rates, "dots": True, "look": shown})
        drawn.append(
            {
                **{"kind": "curves", "title": f"Decoding, {sizes}", "note": "decoding"},
                **{"xlabel": "tokens before", "ylabel": "tokens/s", "xlog": True, "ylog": True},
                "xat": sorted({n for points in of.values() for n, _ in points}),
                **{"shared": False, "named": True, "series": series},
            }
        )
    return drawn


def picture(rows: Iterable[Row], path: Path) -> None:
    """The same as PNG, a panel for each choice of sizes; no file where nothing was timed."""
    from ..drawing.figures import Picture  # what only measures needs no matplotlib

    found = curves(rows)
    if not found:
        return
    figure = Picture(figsize=(7.5, 4.5 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axis, (sizes, of) in zip(axes, found.items(), strict=True):
        for name, points in of.items():
            colour, dashed = look(name)
            style = {"color": colour, "linestyle": "--" if dashed else "-", "marker": "o"}
            axis.loglog(*zip(*points, strict=True), label=name, markersize=3, **style)
        ticks = sorted({n for points in of.values() for n, _ in points})
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.set(title=f"decoding, {sizes}", xlabel="tokens before", ylabel="tokens/s")
        axis.legend(
            fontsize=7, frameon=False, handlelength=4, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.keep(path, dpi=110)
