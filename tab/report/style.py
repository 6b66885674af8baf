"""One look per mechanism in every picture: colour-blind safe hues (Okabe & Ito 2008; Tol 2021), and
a dash pattern for the second half, so that twelve lines stay tellable apart; labels stand at the
line's end."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np

from ..drawing.figures import Picture
from ..layers import claimed_colours, known_layer

# Of a verdict: hues of the same palettes, each with a marker of its own.
VERDICT = {
    "better": ("#0072B2", "o"),
    "worse": ("#D55E00", "D"),
    "equivalent": ("#009E73", "s"),
    "undecided": ("#7A7A7A", "o"),
    "": ("#7A7A7A", "o"),
}
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#882255")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)))
_SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "text.parse_math": False,  # names of classes and mechanisms may hold $
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 130,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # words stay words
}


def look(attention: str, others: list[str]) -> dict:
    """Line keywords. The control is a thick black line; a mechanism whose layer claims no colour
    takes the next free one, in the order of `others` (all mechanisms of the comparison)."""
    if attention == "none":
        return {"color": "#000000", "linestyle": "-", "linewidth": 2.4, "zorder": 5}
    i = place(attention)
    if i is None:
        without = [name for name in others if name != "none" and place(name) is None]
        claimed = claimed_colours()
        free = (i for i in itertools.count() if i not in claimed)
        i = dict(zip(without, free, strict=False))[attention]
    dash = _DASHES[i // len(_HUES) % len(_DASHES)]
    return {"color": _HUES[i % len(_HUES)], "linestyle": dash, "linewidth": 1.6, "zorder": 3}


def place(attention: str) -> int | None:
    """In the palette: one hue after the other, then again with the next dash."""
    layer = known_layer(attention)
    return layer and layer.colour


@contextmanager
def figure(
    path: Path,
    panels: int,
    *,
    width: float = 6.4,
    height: float = 4.8,
    columns: int = 2,
    ratios: tuple[float, ...] | None = None,
    svg: bool = False,
):
    """Yields the axes of a new figure and saves it as `path`. ratios: of the columns' widths. svg:
    beside it also as .svg."""
    with matplotlib.rc_context(_SETTINGS):
        columns = min(columns, panels)
        rows = -(-panels // columns)
        fig = Picture(figsize=(width * columns, height * rows))
        axes = fig.subplots(rows, columns, squeeze=False, width_ratios=ratios)
        for spare in axes.flat[panels:]:
            spare.set_axis_off()
        fig.subplots_adjust(wspace=0.55, hspace=0.35)
        yield fig, list(axes.flat[:panels])
        fig.keep(path, *[path.with_suffix(".svg")] * svg)


def label_ends(ax, ends: list[tuple[float, float, str, dict]]) -> None:
    """Writes each line's name (x, y, text, look) right of the axes with a sample of the line, tied
    to the line's end; names keep their order and a distance (isotonic regression by pooling
    adjacent violators)."""
    ax.get_xlim(), ax.get_ylim()  # settles them, without drawing
    ends = [end for end in ends if np.isfinite(end[1])]
    if not ends:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    points = [(*to_axes.transform((x, y))[::-1], text, line) for x, y, text, line in ends]
    points.sort(key=lambda point: point[:3])  # by y, then x, then name
    gap = 12.5 / (ax.get_window_extent().height / ax.figure.dpi * 72)
    pools: list[list[float]] = []  # each: wanted y - i·gap of neighbours that must share one value
    for i, point in enumerate(points):
        pools.append([point[0] - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) >= np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = 1.0 - (len(points) - 1) * gap  # keeps the first above the bottom, the last below the top
    means = [np.mean(pool) for pool in pools for _ in pool]
    places = np.clip(means, min(0.0, room), room)
    for i, ((y, x, text, line), place) in enumerate(zip(points, places, strict=True)):
        where, colour = place + i * gap, line["color"]
        free = {"transform": ax.transAxes, "clip_on": False}
        ax.plot([x, 1.05], [y, where], color=colour, linewidth=0.6, alpha=0.6, **free)
        ax.plot([1.05, 1.12], [where, where], **line, **free)
        ax.text(1.135, where, text, va="center", color=colour, fontsize=8.5, **free)
