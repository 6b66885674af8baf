"""Independent tasks, and the executor that runs them one after the other in this process.

A task is a function of its arguments and of one folder, which it leaves in a state it can go on
from: so a task whose process or machine dies is run again and continues. Where it ran changes
nothing of its result.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..plugins import Plugin, load, loaded

T = TypeVar("T")
OnEvent = Callable[[int, object], None]
log = logging.getLogger("tab")
ATTEMPTS = 3  # of a task whose process or machine died; its own exception ends it at once


@dataclass(frozen=True)
class Task(Generic[T]):
    """function(*arguments, folder=folder, emit=emit), where emit(event) tells the driver.

    The function is one of a module's, since it is pickled by name; arguments, events and the value
    are pickled. What is large and the same for many tasks goes as a `Shared`.
    """

    function: Callable[..., T]
    arguments: tuple
    folder: Path  # the only place it reads and writes on disk; made by the executor
    parts: tuple[str, ...] = ()  # the folders below it that are its own, if not all of it
    plugins: tuple[Plugin, ...] = field(default_factory=loaded)  # run where the task is, before it

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join(self.parts) or self.folder.name


@dataclass(frozen=True)
class Done(Generic[T]):
    """One task's end: its value, or its error with the traceback as text."""

    index: int
    value: T | None = None
    error: Exception | None = None
    traceback: str = ""


class Executor(Protocol):
    """Where tasks run: in this process, in others, on a cluster."""

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        """Yields a `Done` per task, in the order they end, and calls on_event(index, event) in
        this process, in the order of the task's events. An exception ends its own task only;
        Control-C, or closing the iterator, ends them all. on_event must not raise an Exception."""


_shared: dict[str, object] = {}


@dataclass(frozen=True)
class Shared(Generic[T]):
    """A large value that many tasks read: one in each process, by `key`. `load` makes it where it
    is not yet there; Ray sends it once to each node instead."""

    key: str
    load: Callable[[], T]

    def get(self, load: Callable[[], T] | None = None) -> T:
        if self.key not in _shared:
            self.put((load or self.load)())
        return _shared[self.key]

    def put(self, value: T) -> None:
        """Takes the place of the value before: a process works on one data set at a time."""
        _shared.clear()
        _shared[self.key] = value


def run_tasks(
    tasks: Sequence[Task[T]], executor: Executor | None = None, on_event: OnEvent | None = None
) -> Iterator[Done[T]]:
    """`executor.run`, by default in this process."""
    return (executor or InProcess()).run(tasks, on_event or (lambda index, event: None))


def attempt(index: int, task: Task[T], emit: Callable[[object], None]) -> Done[T]:
    """Runs the task here."""
    try:
        load(task.plugins)
        task.folder.mkdir(parents=True, exist_ok=True)
        return Done(index, task.function(*task.arguments, folder=task.folder, emit=emit))
    except Exception as error:
        return Done(index, error=error, traceback=traceback.format_exc())


class InProcess:
    """One task after the other, in this process."""

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        for index, task in enumerate(tasks):
            yield attempt(index, task, lambda event, index=index: on_event(index, event))


def died(index: int, why: str) -> Done:
    """The end of a task that took its process with it each time."""
    error = RuntimeError(
        f"{why}, {ATTEMPTS} times in this task; what it had written is kept, and it continues from "
        "there when it is run again"
    )
    return Done(index, error=error, traceback=f"RuntimeError: {error}\n")


def portable(done: Done[T]) -> Done[T]:
    """The same, sure to be pickled and read again: else it says what could not be."""
    try:
        pickle.loads(pickle.dumps(done))
        return done
    except Exception as error:
        if done.error:
            text = "".join(traceback.format_exception_only(done.error)).strip()
            return Done(done.index, error=RuntimeError(text), traceback=done.traceback)
        return Done(done.index, error=error, traceback=traceback.format_exc())
