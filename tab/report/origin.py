"""Where a report's numbers come from: machine, data, command, times, and which runs are missing."""

from __future__ import annotations

import json

from ..compare.runs import Run
from .text import code, counted, plain


def machine(facts: dict, runs: list[Run]) -> str:
    if facts["device"] != "cpu":
        return facts["device"]
    threads = sorted({run.threads for run in runs if run.threads}) or [facts["threads"]]
    *others, most = threads
    listed = " or ".join([*map(str, others), counted(most, "thread")])
    return f"{facts['cpu']}, {listed} a run"


def origin(facts: dict, runs: list[Run]) -> list[str]:
    """The data, the command and its overrides, when it ran, and how busy the machine was; of what
    older comparisons did not keep there is no word."""
    data = facts["dataset"]
    text = f"**Data:** {plain(data['note'])}"
    if "classes" in data:
        text += f" ({plain(data['name'])}, fingerprint {data['fingerprint'][:12]}): trained on "
        text += f"{data['train']:,} images, validated on {data.get('validation', 0):,}, "
        text += f"tested on {data['test']:,}, {data['classes']} classes."
    parts = [text]
    if "command" in facts:
        changes = facts.get("overrides") or {}
        listed = ", ".join(code(f"{key} = {json.dumps(x)}") for key, x in changes.items())
        parts.append(f"**Command:** {code(facts['command'])}. Overrides: {listed or 'none'}.")
    lines = [
        f"{time['started']} to {time.get('ended', 'a kill')} (load average "
        f"{_load(time['load'])} before, {_load(time.get('load_at_end'))} after)"
        for time in facts.get("times", [])
    ]
    if loads := [run.load for run in runs if run.load is not None]:
        lines.append(f"load average at the end of a run: {min(loads):g} to {max(loads):g}")
    return [*parts, *([f"**Ran:** {'; '.join(lines)}."] if lines else [])]


def _load(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def unfinished(runs: list[Run]) -> list[str]:
    """A line for each run that is not in the means, or in them as chance."""
    lines = []
    for run in runs:
        if run.status == "failed":
            lines.append(f"- {code(run.id)} failed: {plain(run.error.strip().splitlines()[-1])}")
        elif run.status == "running":
            lines.append(f"- {code(run.id)}: {run.state}")
    if missing := [code(run.id) for run in runs if run.status == "missing"]:
        lines.append(f"- not begun: {', '.join(missing)}")
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
