"""Runs independent tasks: in this process, in processes of this machine, or on a Ray cluster.

A task is a function of its arguments and of one folder, which it leaves in a state it can go on
from: so a task whose process or machine dies is run again and continues. Where it ran changes
nothing of its result.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from typing import Generic, Protocol, TypeVar

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


def executor(
    jobs: int = 1,
    ray: str | None = None,
    *,
    threads: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Executor:
    """What the command line's options ask for: `jobs` processes, or a Ray cluster at the address
    `ray` ("local": one started here, for the time of the tasks) with cpus and gpus for each task.

    ValueError: both, or a number out of range. ImportError: Ray is not installed.
    """
    if ray is not None:
        if jobs != 1 or threads is not None:
            raise ValueError(
                f"jobs = {jobs}, threads = {threads} and ray = {ray!r}: Ray itself decides how "
                "many tasks run at once, each with the cores it asks for; drop jobs and threads"
            )
        from ._ray import Ray

        return Ray(ray, cpus=cpus, gpus=gpus)
    if jobs == 1 and threads is None:
        return InProcess()
    return Processes(jobs, threads)


def run_tasks(
    tasks: Sequence[Task[T]], executor: Executor | None = None, on_event: OnEvent | None = None
) -> Iterator[Done[T]]:
    """`executor.run`, by default in this process."""
    return (executor or InProcess()).run(tasks, on_event or (lambda index, event: None))


def attempt(index: int, task: Task[T], emit: Callable[[object], None]) -> Done[T]:
    """Runs the task here."""
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        return Done(index, task.function(*task.arguments, folder=task.folder, emit=emit))
    except Exception as error:
        return Done(index, error=error, traceback=traceback.format_exc())


class InProcess:
    """One task after the other, in this process."""

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        for index, task in enumerate(tasks):
            yield attempt(index, task, lambda event, index=index: on_event(index, event))


# --- processes ------------------------------------------------------------------------------------


class Processes:
    """`jobs` processes of this machine, each with `threads` threads: by default its share of the
    cores. A process that dies is replaced, and its task goes on from its folder.

    Not concurrent.futures: there, one process that dies breaks the pool and all its futures, a task
    has no channel to tell its progress, and Control-C waits for what runs. A pipe for each process
    gives all three: its end is the process's end, on either side.
    """

    def __init__(self, jobs: int, threads: int | None = None):
        if jobs < 1 or (threads is not None and threads < 1):
            raise ValueError(f"jobs = {jobs}, threads = {threads}: give 1 or more")
        self.jobs, self.threads = jobs, threads or max(1, cores() // jobs)

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        waiting, deaths = deque(range(len(tasks))), Counter()
        workers: dict[connection.Connection, _Worker] = {}
        try:
            while waiting or workers:
                while waiting and len(workers) < self.jobs:
                    worker = _Worker(self.threads)
                    workers[worker.pipe] = worker
                    worker.give(waiting[0], tasks[waiting.popleft()])
                for pipe in connection.wait(list(workers)):
                    worker = workers[pipe]
                    try:
                        kind, content = pipe.recv()
                    except (EOFError, OSError):  # between two messages, or in the middle of one
                        worker.process.join(10)  # as it ended by itself, before end() kills it
                        index, why = worker.index, workers.pop(pipe).end()
                        deaths[index] += 1
                        if deaths[index] < ATTEMPTS:
                            log.warning("%s: %s; it goes on", tasks[index].name, why)
                            waiting.appendleft(index)
                        else:
                            yield died(index, why)
                        continue
                    if kind == "event":
                        on_event(worker.index, content)
                        continue
                    if waiting:  # first, so that it works while the caller reads
                        worker.give(waiting[0], tasks[waiting.popleft()])
                    else:
                        workers.pop(pipe).end()
                    yield content
        finally:
            for worker in workers.values():
                worker.process.kill()
            for worker in workers.values():
                worker.end()


def cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def died(index: int, why: str) -> Done:
    """The end of a task that took its process with it each time."""
    error = RuntimeError(
        f"{why}, {ATTEMPTS} times in this task; what it had written is kept, and it continues from "
        "there when it is run again"
    )
    return Done(index, error=error, traceback=f"RuntimeError: {error}\n")


class _Worker:
    """The driver's side of a process; `index` is the task it has."""

    def __init__(self, threads: int):
        context = get_context("spawn")  # CUDA and OpenMP do not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads), daemon=True)
        with _environment(threads), _no_interrupt():
            self.process.start()
        theirs.close()  # so that the process's end closes the last one

    def give(self, index: int, task: Task) -> None:
        self.index = index
        with contextlib.suppress(OSError):  # it died: the next recv says so
            self.pipe.send((index, task))

    def end(self) -> str:
        """Ends the process, if it has not; says how it ended."""
        # Killing is safe: whatever a task writes is whole at any moment.
        self.pipe.close()
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        memory = ", often sent by a system that is out of memory" if how == "SIGKILL" else ""
        return f"its process ended ({how}{memory})"


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """OpenMP reads these when it loads: what starts in here begins with them."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """A terminal sends Control-C to every process of the group; what starts in here never gets it,
    since the mask is inherited, and this one gets it afterwards."""
    resource_tracker.ensure_running()  # its start, in the first process's, would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection, threads: int) -> None:
    """What the process does until it is ended, or the driver has died."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the driver is ending
        while True:
            index, task = pipe.recv()
            done = attempt(index, task, lambda event: pipe.send(("event", event)))
            pipe.send(("end", portable(done)))


def _end_with_driver() -> None:
    parent_process().join()
    os._exit(1)


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
