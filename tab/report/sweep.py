"""A sweep in a table, charts and one picture: who was trained and went on, what won and mattered.

All from its trials (tab/sweep/trials.py), be they of a running sweep's record or of trials.csv.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from matplotlib.ticker import MaxNLocator

from ..files.formats import read_toml
from ..sweep.trials import WAY_OUT, Pair, RungTrial, winner_of
from .chart_data import Group
from .style import figure, look
from .tables import markdown_lines
from .text import plain
from .text import title as name_of

HEADING = "Hyperparameters"
Trials = dict[Pair, list[RungTrial]]


class Titled(TypedDict):
    title: str


def told(folder: Path) -> str:
    """What the sweep's own winners.toml says of it; "" before there is one."""
    path = folder / "winners.toml"
    return read_toml(path, Titled, WAY_OUT)["title"] if path.exists() else ""


def _scores(trials: list[RungTrial], epochs: int) -> list[float]:
    """Of the configurations that were scored at the rung that ends there."""
    return [t.score for t in trials if t.epochs == epochs and t.score is not None]


# --- report.md ------------------------------------------------------------------------------------


def sweep_section(found: Trials, what: str) -> str:
    """what: of the sweep, as `told`."""
    rungs = sorted({trial.epochs for trials in found.values() for trial in trials})
    lines = []
    for (model, attention), trials in found.items():
        line, won = [model.upper(), name_of(attention)], winner_of(trials)
        for epochs in rungs:
            scores = _scores(trials, epochs)
            line.append(f"{100 * max(scores):.1f} (of {len(scores)})" if scores else "–")
        lost = len({t.configuration for t in trials if t.score is None})
        line += [str(lost or "–"), f"{100 * won.score:.1f}" if won else "–"]
        lines.append([*line, won.chosen() or "nothing was drawn" if won else "–"])
    header = ["Model", "Attention", *(f"Epoch {n}" for n in rungs), "Lost", "Winner's", "Winner"]
    words = f"{plain(what)}. " if what else ""
    words += (
        "Successive halving: validation accuracy in per cent of the best configuration at each "
        "rung, and how many were scored there; the best of the last rung won. Lost: diverged or "
        "failed. The test set was not scored."
    )
    return f"## {HEADING}\n\n{words}\n\n{markdown_lines(header, lines)}"


# --- pictures -------------------------------------------------------------------------------------


def sweep_charts(found: Trials) -> Group:
    """For report.html: a chart for each pair, a line for each configuration; the winner's in its
    mechanism's colour."""
    charts = []
    for (model, attention), trials in found.items():
        won, series = winner_of(trials), []
        for number in dict.fromkeys(t.configuration for t in trials):
            mine = [t for t in trials if t.configuration == number and t.score is not None]
            if not mine:
                continue
            best = won is not None and number == won.configuration
            name = f"configuration {number}{', the winner' if best else ''}"
            line = {"name": name} if best else {"name": name, "color": "var(--grey)", "width": 1}
            series.append(
                {
                    "key": attention,
                    "x": [t.epochs for t in mine],
                    "y": [round(100 * t.score, 3) for t in mine],
                    "look": {**line, "dash": ""},
                    "facts": mine[0].facts(),
                    "dots": True,
                }
            )
        series.sort(key=lambda line: "color" not in line["look"])  # the winner lies on top
        score = f": {100 * won.score:.1f} %" if won else ""
        charts.append(
            {
                "kind": "curves",
                "title": f"{model.upper()} {name_of(attention)}{score}",
                "xlabel": "epoch",
                "ylabel": "validation accuracy (%)",
                "shared": False,
                "own": True,
                "series": series,
            }
        )
    note = "A line for each configuration, the winner's in colour; a dot: a rung."
    return Group(HEADING, note, charts, small=len(charts) > 2)


def halving_picture(path: Path, found: Trials, rungs: tuple[int, ...]) -> None:
    """A panel for each pair: validation accuracy by epoch, one line a configuration; the further it
    came the darker, the winner in its mechanism's colour; dotted: the rungs."""
    shown = {pair: trials for pair, trials in found.items() if trials}
    others = list(dict.fromkeys(attention for _, attention in found))
    columns = 4 if len(shown) > 4 else 2
    with figure(path, len(shown), width=3.3, height=2.5, columns=columns) as (fig, axes):
        fig.subplots_adjust(wspace=0.28, hspace=0.45)
        for ax, ((model, attention), trials) in zip(axes, shown.items(), strict=True):
            won = winner_of(trials)
            for number, curve, rung in _curves(trials):
                grey = 0.82 - 0.45 * rung / max(1, len(rungs) - 1)
                line = {"color": str(grey), "linewidth": 0.9, "zorder": 2}
                if won and won.configuration == number:
                    line = {**look(attention, others), "linewidth": 2.2, "zorder": 4}
                epochs = sorted(curve)
                dots = [epochs.index(epoch) for epoch in epochs if epoch in rungs]
                heights = [100 * curve[epoch] for epoch in epochs]
                ax.plot(epochs, heights, **line, marker="o", markevery=dots, markersize=3)
            for epochs in rungs[:-1]:
                ax.axvline(epochs, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
            score = f": {won.score:.1%}" if won else ""
            ax.set_title(f"{model.upper()} {name_of(attention)}{score}", fontsize=9)
            ax.set(xlabel="epoch", xlim=(0.8, rungs[-1] + 0.2))
            ax.set_ylabel("validation accuracy (%)", fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(trials: list[RungTrial]) -> list[tuple[int, dict[int, float], int]]:
    """(configuration, epoch -> accuracy over all its rungs, highest rung)"""
    joined = []
    for number in sorted({trial.configuration for trial in trials}):
        mine = [trial for trial in trials if trial.configuration == number]
        curve = {epoch: value for trial in mine for epoch, value in trial.points.items()}
        if curve:
            joined.append((number, curve, max(trial.rung for trial in mine)))
    return joined
