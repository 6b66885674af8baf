"""H2O's cache on trained multi_head models: accuracy against budget, beside two controls."""

from __future__ import annotations

from ..analysis.cache_budget import BUDGETS, POLICIES
from ..compare.runs import Run
from .averages import Mean
from .tables import markdown_lines

Found = dict[str, dict]  # robustness.json of one run
NAMES = {"heavy": "H2O: heavy hitters and latest", "recent": "latest", "random": "at random"}


def cache_table(mine: list[tuple[Run, Found]]) -> str:
    """Of the runs of one model; "" if none of them was measured."""
    measured = [found["cache"] for _, found in mine if "cache" in found]
    if not measured:
        return ""
    lines = []
    for policy in POLICIES:
        curves = [s["accuracy" if policy == "heavy" else policy] for s in measured]
        cells = (Mean.of(list(at)).show(".1f", 100) for at in zip(*curves, strict=True))
        lines.append([NAMES[policy], *cells])
    images = max(section["images"] for section in measured)
    text = (
        "What Multi-Head, trained with all tokens, still answers when each head keeps a part of "
        f"them: accuracy in per cent on {images:,} test images, means over seeds ± half a 95 % "
        "t-interval. The choice of H2O is worth something where it beats both other rows."
    )
    header = ["Tokens kept", *(f"{share:.4g}" for share in BUDGETS)]
    return markdown_lines(header, lines) + "\n\n" + text
