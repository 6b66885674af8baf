"""Files that are whole or not there: written aside, synced, renamed; read only if the sum is right.

A `.pt` file is what torch.save writes, a zip archive: torch.load(path, weights_only=True) reads it.
Its checksum is the archive's comment, "tab sha256 <hex>", verified before anything is unpickled.
(Version 0.1 wrote it as a line before the archive, which is still read.)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

PART, LOCK = ".part", "lock"  # names of what is no result: a file half written, and `locked`'s
_MARK = b"tab sha256 "
_SUM = len(_MARK) + 64


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
    # An archive ends with the length of its comment, in two bytes, and the comment.
    data = buffer.getvalue()[:-2] + _SUM.to_bytes(2, "little")
    write_bytes(path, data + _sum(data))


def load(path: Path, device: str | torch.device = "cpu") -> dict:
    """What `save` wrote; Corrupt if a byte differs."""
    raw = path.read_bytes()
    if raw.startswith(_MARK):
        data, found = raw[_SUM + 1 :], raw[:_SUM]
    else:
        data, found = raw[:-_SUM], raw[-_SUM:]
    if found != _sum(data):
        raise Corrupt(f"{path} is truncated or altered ({len(raw)} bytes): its checksum differs")
    whole = data if raw.startswith(_MARK) else raw
    return torch.load(io.BytesIO(whole), map_location=device, weights_only=True)


def _sum(data: bytes) -> bytes:
    return _MARK + hashlib.sha256(data).hexdigest().encode()


def digest(*paths: Path) -> str:
    """SHA-256 over that of each file."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`; the system drops the lock if the process dies."""
    lock, owner = filelock.FileLock(folder / LOCK), folder / f"{LOCK}{PART}"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = owner.read_text(errors="replace") if owner.is_file() else "unknown"
        raise ValueError(
            f"{folder} is in use by process {who}; wait for it, or give another directory"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
