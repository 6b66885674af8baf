"""A cache of arrays: one .npz file without pickles, written whole or not at all.

The zip inside an .npz carries a CRC-32 of each array, so an altered or truncated file is noticed.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np


def load(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays, or None where there are none or they were made of something other than `key`."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as npz:
            return dict(npz) if str(npz["key"]) == key else None
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise OSError(
            f"the cache {file} is truncated or altered ({error}); delete it and load again"
        ) from error


def save(file: Path, key: str, **arrays: object) -> None:
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
        raise OSError(
            f"cannot write {file} ({error}); set TAB_DATA to a folder that can be written"
        ) from error
