"""What tuning gave each row: the best of n configurations, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..compare.plan import Grid
from ..sweep.trials import Pair, RungTrial, winner_of
from .tables import markdown_lines
from .text import counted, title


def best_of(scores: Sequence[float], n: int) -> float:
    """The expected best of n of these scores, drawn without replacement (Dodge et al. 2019, "Show
    Your Work", section 3.1, there with replacement): Σ_k s_(k)·C(k−1, n−1)/C(N, n)."""
    ways = [math.comb(k, n - 1) for k in range(len(scores))]
    return sum(w * s for w, s in zip(ways, sorted(scores), strict=True)) / math.comb(len(scores), n)


def tuned_or_not(grid: Grid) -> str:
    if not grid.tune:
        return (
            "**Not tuned:** every row was trained with the recipe's own learning rate and weight "
            "decay. Another rate can change the order (`--tune N` searches for each row)."
        )
    return (
        f"**Tuned:** for each row the same {grid.tune} draws of learning rate, weight decay and "
        "rate of the gates, the best of them chosen on images held out from training; then trained "
        "anew from other seeds."
    )


def tuning_section(trials: dict[Pair, list[RungTrial]], grid: Grid) -> str:
    """The expected best of 1, 2, 4 … configurations after the first rung, where all were scored,
    and the winner."""
    steps = [2**i for i in range(grid.tune.bit_length()) if 2**i < grid.tune] + [grid.tune]
    parts, epochs = ["## Tuning"], 0
    for model in grid.models:
        lines = []
        for attention in grid.attentions:
            mine = trials.get((model, attention), [])
            first = {t.configuration: t for t in mine if t.rung == 0}
            won = winner_of(mine)
            if not first or won is None:
                continue
            epochs = next(iter(first.values())).epochs
            scores = [t.score or 1 / grid.classes for t in first.values()]
            cells = [f"{100 * best_of(scores, n):.1f}" if n <= len(scores) else "–" for n in steps]
            lines.append([title(attention), *cells, f"{100 * won.score:.1f}", won.chosen()])
        if lines:
            header = ["Attention", *(f"Best of {n}" for n in steps), "Winner (%)", "Configuration"]
            parts += [f"**{model.upper()}**", markdown_lines(header, lines)]
    if len(parts) == 1:
        return ""
    parts.append(
        f"Accuracy in per cent on the images held out. Best of n: what n configurations can be "
        f"expected to reach after {counted(epochs, 'epoch')}, where all were scored (a run that "
        "diverged counts as chance). Winner: after all epochs. A row that still climbs at the "
        "right is not yet tuned, and a row that needs many draws is harder to use."
    )
    return "\n\n".join(parts)
