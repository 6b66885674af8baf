"""Files that are whole or not there: written aside, synced, renamed; read only if the sum is right.

A `.pt` file is one line, "tab sha256 <hex>", then what torch.save wrote. The sum is verified before
anything is unpickled, and then only tensors and plain values are (weights_only).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch

PART, LOCK = ".part", "lock"  # names of what is no result: a file half written, and `locked`'s
_MARK = b"tab sha256 "
_HEAD = len(_MARK) + 64 + 1


class Corrupt(ValueError):
    """A file that is not what was written."""


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` in one step: a crash leaves the old file or the new one, never a half.
    So does a full disk, which gets back what was written aside."""
    aside = path.with_name(path.name + PART)
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def save(path: Path, state: object) -> None:
    """Writes tensors and plain values, atomically, with their checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_bytes(path, _MARK + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def load(path: Path, device: str | torch.device = "cpu") -> dict:
    """What `save` wrote; Corrupt if a byte differs."""
    raw = path.read_bytes()
    head, data = raw[:_HEAD], raw[_HEAD:]
    if head != _MARK + hashlib.sha256(data).hexdigest().encode() + b"\n":
        raise Corrupt(f"{path} is truncated or altered ({len(raw)} bytes): its checksum differs")
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`; the system drops the lock if the process dies."""
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by process {file.read().strip() or 'unknown'}; wait for it, "
                "or give another directory"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
