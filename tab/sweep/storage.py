"""Where a sweep's studies lie, a journal file or a PostgreSQL database, and who may write there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..files.formats import reading

if TYPE_CHECKING:
    import optuna
else:

    class _AtUse:
        """Optuna, imported when it is first used: what only names a sweep does without it, such as
        a comparison that tunes nothing."""

        def __getattr__(self, name: str):
            return getattr(needed(), name)

    optuna = _AtUse()


def needed() -> ModuleType:
    """Optuna; an ImportError that says how to install it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            'a sweep needs Optuna: pip install "transformer-attention-bench[sweep]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def opened(url: str, path: Path, name: str, *, mine: bool) -> Iterator[optuna.storages.BaseStorage]:
    """The storage of the sweep `name`: the database at `url`, or the journal file `path`."""
    if url:
        with postgresql(url, name, mine=mine) as storage:
            yield storage
    else:
        yield journal(path, mine=mine)


def journal(path: Path, *, mine: bool) -> optuna.storages.BaseStorage:
    """The journal file. mine: the caller is the only driver, so that what a killed one left (a lock
    of the file, half a line at its end) is cleared; Optuna would wait for the first and never read
    past the second."""
    if mine:
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    with reading(path, "put a copy back, or remove it and resume, which comes to the same results"):
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


@contextlib.contextmanager
def postgresql(url: str, name: str, *, mine: bool) -> Iterator[optuna.storages.BaseStorage]:
    """The database at `url`. mine: held for the sweep `name` by an advisory lock, which the server
    drops with the connection."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
        storage = optuna.storages.RDBStorage(parsed.render_as_string(hide_password=False))
    except ImportError as error:
        raise ImportError('PostgreSQL needs psycopg: pip install "psycopg[binary]"') from error
    except sqlalchemy.exc.OperationalError as error:
        raise ValueError(f"no database at {without_password(url)}: {error.orig}") from None
    with storage.engine.connect() as connection:
        connection.detach()  # from the pool, which would keep it open, and the lock with it
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        question = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if mine and not connection.execute(question, {"key": key}).scalar():
            raise ValueError(
                f"the sweep {name!r} in {without_password(url)} has another driver; wait for it, "
                "or start a sweep in a directory of another name"
            )
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def without_password(url: str) -> str:
    """The address as it may stand in a file; a ValueError if it is none of PostgreSQL."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() != "postgresql":
        raise ValueError(f"storage = {url!r}: give postgresql://USER@HOST/DATABASE")
    parts = (parsed.host, parsed.port, parsed.database, parsed.query)
    kept = sqlalchemy.URL.create("postgresql", parsed.username, None, *parts)
    return kept.render_as_string()
