"""A sweep in tables and one picture: who was trained, who went on, what won, what mattered."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ..sweep.driver import winners
from ..sweep.halving import Budget
from ..sweep.plan import Pair
from ..sweep.record import Ended, PairRecord
from .style import figure, look
from .tables import title as name_of


def rungs_table(found: dict[Pair, PairRecord], budget: Budget, heading: str) -> Table:
    """One line for each pair: configurations scored and best accuracy by rung, and the winner."""
    best = winners(found)
    columns = ["model", "attention", *(f"epoch {epochs}" for epochs in budget.epochs)]
    table = Table(*columns, "diverged", "failed", "best", "configuration", title=heading,
                  title_justify="left", title_style="bold")  # fmt: skip
    for pair, record in found.items():
        ended = list(record.ended().values())
        cells = []
        for rung in range(len(budget.epochs)):
            scores = [e.score for e in ended if e.entry.rung == rung and e.score is not None]
            cells.append(f"{len(scores)}: {max(scores):.1%}" if scores else "–")
        counts = [sum(e.status == status for e in ended) for status in ("diverged", "failed")]
        cells += [str(count or "–") for count in counts]
        won = best.get(pair)
        cells.append(f"{won.score:.1%}" if won else "–")
        chosen = ", ".join(f"{k} {_short(v)}" for k, v in won.entry.params.items()) if won else "–"
        table.add_row(pair[0], name_of(pair[1]), *cells, chosen)
    return table


def importance_table(found: dict[Pair, PairRecord]) -> Table | None:
    """How much each option decides the accuracy at the first rung; None if too few were scored."""
    shares = {pair: share for pair, record in found.items() if (share := record.importance())}
    if not shares:
        return None
    names = list(dict.fromkeys(name for share in shares.values() for name in share))
    heading = "Importance of each option at the first rung (fANOVA, shares of 1)"
    table = Table("model", "attention", *names, title=heading, title_justify="left",
                  title_style="bold")  # fmt: skip
    for pair, share in shares.items():
        cells = (f"{share[name]:.2f}" if name in share else "–" for name in names)
        table.add_row(pair[0], name_of(pair[1]), *cells)
    return table


def halving_picture(path: Path, found: dict[Pair, PairRecord], budget: Budget) -> None:
    """A panel for each pair: validation accuracy by epoch, one line a configuration; the further it
    came the darker, the winner in its mechanism's colour; dotted: the rungs."""
    best = winners(found)
    shown = [pair for pair in found if found[pair].ended()]
    others = list(dict.fromkeys(attention for _, attention in found))
    columns = 4 if len(shown) > 4 else 2
    with figure(path, len(shown), width=3.3, height=2.5, columns=columns) as (fig, axes):
        fig.subplots_adjust(wspace=0.28, hspace=0.45)
        for ax, pair in zip(axes, shown, strict=True):
            for number, curve, rung in _curves(list(found[pair].ended().values())):
                grey = 0.82 - 0.45 * rung / max(1, len(budget.epochs) - 1)
                line = {"color": str(grey), "linewidth": 0.9, "zorder": 2}
                if pair in best and best[pair].entry.configuration == number:
                    line = {**look(pair[1], others), "linewidth": 2.2, "zorder": 4}
                epochs = sorted(curve)
                ends = [e for e in epochs if e in budget.epochs]
                ax.plot(epochs, [100 * curve[e] for e in epochs], **line, marker="o",
                        markevery=[epochs.index(e) for e in ends], markersize=3)  # fmt: skip
            for epochs in budget.epochs[:-1]:
                ax.axvline(epochs, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
            won = f": {best[pair].score:.1%}" if pair in best else ""
            ax.set_title(f"{pair[0].upper()} {name_of(pair[1])}{won}", fontsize=9)
            ax.set(xlabel="epoch", xlim=(0.8, budget.epochs[-1] + 0.2))
            ax.set_ylabel("validation accuracy (%)", fontsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(ended: list[Ended]) -> list[tuple[int, dict[int, float], int]]:
    """(configuration, epoch -> accuracy over all its rungs, highest rung)"""
    numbers = sorted({end.entry.configuration for end in ended})
    joined = []
    for number in numbers:
        mine = [end for end in ended if end.entry.configuration == number]
        curve = {epoch: value for end in mine for epoch, value in end.curve.items()}
        if curve:
            joined.append((number, curve, max(end.entry.rung for end in mine)))
    return joined


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
