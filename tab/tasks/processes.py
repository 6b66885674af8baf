"""Tasks in processes of this machine."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing import connection, get_context, parent_process, resource_tracker

from ..machine import cores
from .tasks import ATTEMPTS, Done, OnEvent, T, Task, attempt, died, log, portable


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


class _Worker:
    """The driver's side of a process; `index` is the task it has."""

    def __init__(self, threads: int):
        context = get_context("spawn")  # CUDA and OpenMP do not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
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


def variables(threads: int) -> dict[str, str]:
    """OpenMP and MKL read these when they load: a process has so many threads then, also more than
    there are cores. It need not import torch for that, which takes seconds."""
    count = str(threads)
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "MKL_DYNAMIC": "FALSE"}


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What starts in here has so many threads."""
    ours = variables(threads)
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """A terminal sends Control-C to every process of the group; what starts in here never gets it,
    since the mask is inherited, and this one gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start, in the first process's, would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection) -> None:
    """What the process does until it is ended, or the driver has died."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    gc.disable()  # the first task loads PyTorch, nothing of which is garbage
    with contextlib.suppress(EOFError, BrokenPipeError):  # the driver is ending
        while True:
            index, task = pipe.recv()
            gc.enable()
            done = attempt(index, task, lambda event: pipe.send(("event", event)))
            pipe.send(("end", portable(done)))


def _end_with_driver() -> None:
    parent_process().join()
    os._exit(1)
