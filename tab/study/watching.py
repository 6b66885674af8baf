"""--watch: the programs that runs are logged to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path


def watched(names: Iterable[str] | None, *, tensorboard: bool = False) -> dict[str, type]:
    """The classes of these names, checked before anything is written."""
    from ..tracking import check

    return check(list(dict.fromkeys(["tensorboard"] * tensorboard + [*(names or [])])))


def watchers(
    kinds: dict[str, type],
    out: Path,
    study: str = "",
    *,
    failed: Callable[[str], object],
    hint: Callable[[str], object] | None = None,
):
    """These at work on the runs in `out`. failed: told why one of them stopped. hint: told how to
    look at what they write."""
    from ..tracking import Watchers

    found = Watchers(kinds, out, study, say=failed)
    for line in found.hints if hint else ():
        hint(line)
    return found
