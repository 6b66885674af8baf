"""Which runs of a comparison have no result, in words: of one row, and of all."""

from __future__ import annotations

from collections.abc import Iterable

from ..compare.runs import Run
from .text import code, counted, plain, title


def seeds_of(numbers: Iterable[int]) -> str:
    """[1, 2, 3, 7] -> "seeds 1–3, 7"."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    many = len(spans) > 1 or spans[0][0] < spans[0][1]
    listed = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
    return f"seed{'s' if many else ''} {listed}"


def notes(runs: Iterable[Run]) -> str:
    """Of one row: "failed (seed 0), not begun (seeds 1–4)"."""
    states: dict[str, list[int]] = {}
    for run in runs:
        if not run.scored:
            states.setdefault(run.state, []).append(run.seed)
    return ", ".join(f"{state} ({seeds_of(seeds)})" for state, seeds in states.items())


def unfinished(runs: list[Run]) -> list[str]:
    """A line for each run that is not in the means, or in them as chance; those that have not
    begun share one."""
    lines = []
    for run in runs:
        if run.status == "failed":
            lines.append(f"- {code(run.id)} failed: {plain(run.error.strip().splitlines()[-1])}")
        elif run.status == "running":
            lines.append(f"- {code(run.id)}: {run.state}")
    if missing := [run for run in runs if run.status == "missing"]:
        lines.append(f"- {len(missing)} of {counted(len(runs), 'run')} not begun: {_rows(missing)}")
    if any(run.status in ("missing", "running") for run in runs):
        lines.append("- `tab compare --resume` goes on with what is not finished")
    parts = ["**Not in the means:**\n" + "\n".join(lines)] if lines else []
    if diverged := [run for run in runs if run.diverged]:
        listed = ", ".join(f"{code(run.id)} in epoch {len(run.rows)}" for run in diverged)
        parts.append(
            f"**Diverged** (the loss was not finite): {listed}. Such a run counts with the test "
            "accuracy of chance, so that no mechanism is the better for losing its worst runs; "
            "times and training accuracies are those of the others."
        )
    return parts


def _rows(runs: list[Run]) -> str:
    """Those that lack the same seeds stand together: "CNN: seeds 1–4 of Local, Linear"."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        seeds.setdefault((run.model, run.attention), []).append(run.seed)
    models: dict[str, dict[str, list[str]]] = {}
    for (model, attention), mine in seeds.items():
        rows = models.setdefault(model, {})
        rows.setdefault(seeds_of(mine), []).append(plain(title(attention)))
    return ". ".join(
        f"{model.upper()}: "
        + "; ".join(f"{which} of {', '.join(names)}" for which, names in rows.items())
        for model, rows in models.items()
    )
