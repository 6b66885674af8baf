"""Names as they are given from Python: in a list, or separated by commas."""

from __future__ import annotations

from collections.abc import Iterable


def joined(names: str | Iterable[str]) -> str:
    """As the shell writes them."""
    return names if isinstance(names, str) else ",".join(names)


def listed(names: str | Iterable[str]) -> list[str]:
    """In a list."""
    return [part.strip() for part in joined(names).split(",")]
