"""Names as they are given from Python: in a list, or separated by commas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def joined(names: str | Iterable[str]) -> str:
    """As the shell writes them; a ValueError for none, where the shell would take all."""
    names = names if isinstance(names, str) else [*names]
    if not names:
        raise ValueError(f"names are {names!r}: give at least one, or leave them out for all")
    return names if isinstance(names, str) else ",".join(names)


def listed(names: str | Iterable[str]) -> list[str]:
    """In a list."""
    return [part.strip() for part in joined(names).split(",")]


def changed(overrides: Mapping[str, object] | None) -> dict[str, object]:
    """The `--set` of the shell."""
    return dict(overrides or {})
