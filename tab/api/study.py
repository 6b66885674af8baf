"""`tab.load_study`: what lies in a directory of results."""

from __future__ import annotations

from pathlib import Path

from .comparison import Comparison
from .search import Sweep


def load_study(directory: str | Path) -> Comparison | Sweep:
    """The comparison or the sweep in this directory, be it from Python or from the shell.

    Raises ValueError: it holds neither, or its files are damaged.

    >>> found = tab.load_study("results/never")
    Traceback (most recent call last):
    ...
    ValueError: results/never holds no comparison (config.toml) and no sweep (sweep.toml)
    """
    place = Path(directory)
    if (place / "sweep.toml").exists():
        return Sweep(place)
    if (place / "config.toml").exists():
        return Comparison(place)
    raise ValueError(f"{place} holds no comparison (config.toml) and no sweep (sweep.toml)")
