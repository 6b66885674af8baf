"""--watch: the programs that runs are logged to."""

from __future__ import annotations

from pathlib import Path

from .terminal import errors, say


def watched(watch: list[str] | None, *, tensorboard: bool = False) -> dict[str, type]:
    """What --watch and --tensorboard name, checked before anything is written."""
    from ..tracking import check

    return check(list(dict.fromkeys(["tensorboard"] * tensorboard + (watch or []))))


def watchers(kinds: dict[str, type], out: Path, study: str = ""):
    """These at work on the runs in `out`, after a line on how to look at what they write."""
    from ..tracking import Watchers

    found = Watchers(kinds, out, study, say=lambda text: say(text, style="yellow", to=errors))
    for hint in found.hints:
        say(hint)
    return found
