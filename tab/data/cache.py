"""A cache of arrays: one .npz file without pickles, written whole or not at all.

The zip inside an .npz carries a CRC-32 of each array, so an altered or truncated file is noticed.
It holds nothing that cannot be made again: a damaged file counts as none, and a place where none
can be written costs time only.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def load(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays, or None where there are none, or of something other than `key`, or damaged."""
    try:
        with np.load(file, allow_pickle=False) as npz:
            return dict(npz) if str(npz["key"]) == key else None
    except Exception:  # damaged bytes raise whatever the reader stumbles over
        return None


def save(file: Path, key: str, **arrays: Any) -> None:
    """Writes beside `file`, then renames: a reader sees all of it or the one before."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as out:
                np.savez(out, key=key, **arrays)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"the data set is not cached, and will be read anew each time: cannot write {file} "
            f"({error}); set TAB_DATA to a folder that can be written",
            stacklevel=2,
        )
