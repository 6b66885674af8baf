"""Runs independent tasks and hands each result back as it comes: here, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Done(Generic[T]):
    """One task's end: its value, or its error with the traceback as text."""

    index: int
    value: T | None = None
    error: Exception | None = None
    traceback: str = ""


def run_tasks(tasks: Iterable[Callable[[], T]], jobs: int = 1) -> Iterator[Done[T]]:
    """Yields a `Done` per task, in the order they end. An exception ends its own task only;
    Control-C ends them all."""
    if jobs != 1:
        raise ValueError(f"jobs={jobs}: tasks run in this one process; choose jobs=1")
    for index, task in enumerate(tasks):
        try:
            done = Done(index, value=task())
        except Exception as error:
            done = Done(index, error=error, traceback=traceback.format_exc())
        yield done
