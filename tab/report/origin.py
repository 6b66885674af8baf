"""What a comparison was made with, when, and how busy the machine was, in words."""

from __future__ import annotations

import json

from ..compare.runs import Run
from .text import code, counted, plain


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
    loads = [x for run in runs for x in (run.load_at_start, run.load) if x is not None]
    if loads:
        lines.append(f"load average around a run: {min(loads):g} to {max(loads):g}")
    return [*parts, *([f"**Ran:** {'; '.join(lines)}."] if lines else [])]


def _load(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def machine(facts: dict, runs: list[Run]) -> str:
    if facts["device"] != "cpu":
        return facts["device"]
    threads = sorted({run.threads for run in runs if run.threads}) or [facts["threads"]]
    *others, most = threads
    listed = " or ".join([*map(str, others), counted(most, "thread")])
    return f"{facts['cpu']}, {listed} a run"
