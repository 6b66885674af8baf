"""Files that are whole or not there: written aside, synced, renamed. Folders of one process."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import filelock

PART, LOCK = ".part", "lock"  # names of what is no result: a file half written, and `locked`'s


class Corrupt(ValueError):
    """A file that is not what was written."""


def folder(path: Path) -> Path:
    """Makes the directory `path`, with those above it, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"cannot make this directory: {error.strerror}"
        raise OSError(error.errno, text, str(path)) from error
    return path


def write(path: Path, data: bytes, *, own: bool = False) -> None:
    """Replaces `path` in one step: a crash leaves the old file or the new one, never a half.
    So does a full disk, which gets back what was written aside; and so does Control-C. Several
    processes may write one file at once. own: it lies where `locked` lets one alone write, and what
    a kill left aside, which may be large, is then written over."""
    aside = path.with_name(f"{path.name}{'' if own else f'.{os.getpid()}'}{PART}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """`write` in UTF-8; bytes of a name that are no text become \\xNN."""
    write(path, text.encode("utf-8", "backslashreplace"))


def digest(*paths: Path) -> str:
    """SHA-256 over that of each file."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def shown(name: str | Path) -> str:
    """A name as text: a file's may hold bytes that are none."""
    return str(name).encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """One process at a time in `place`; the system drops the lock if the process dies."""
    lock, owner = filelock.FileLock(place / LOCK), place / f"{LOCK}{PART}"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        who = owner.read_text(errors="replace") if owner.is_file() else "unknown"
        raise ValueError(
            f"{place} is in use by process {who}; wait for it, or give another directory"
        ) from None
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def fresh(path: Path) -> Path:
    """Makes the new directory `path`, or path-2, path-3, … should another have taken that name."""
    folder(path.parent)
    for number in itertools.count(1):
        place = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            return place
    raise AssertionError("itertools.count has no end")


def dated(place: str, prefix: str = "", suffix: str = "") -> Path:
    """Makes a new directory in `place`, named after the time."""
    return fresh(Path(place) / f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}")


@contextlib.contextmanager
def begun(out: Path) -> Iterator[Path]:
    """The directory `out`, made and locked, for a comparison or a sweep; an error if it holds
    anything of ours."""
    with locked(folder(out)):
        refuse(out, HOLDS)
        yield out


HOLDS = {"config.toml": "a comparison", "sweep.toml": "a sweep", "run.json": "a run"}


def refuse(out: Path, kinds: Iterable[str]) -> None:
    """A ValueError if `out` has one of these files of HOLDS: a directory that held two would be
    taken for either."""
    for file in kinds:
        if (out / file).exists():
            raise ValueError(f"{out} already holds {HOLDS[file]}: resume it, or give another place")
