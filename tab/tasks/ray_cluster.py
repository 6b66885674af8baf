"""Tasks on a Ray cluster, whose nodes need not share a disk, only have TAB installed.

The contents of a task's folder go to a node with it. After each event, and at its end, what has
changed comes back and is written here, whole files only. So when a node or a worker dies, its task
goes on elsewhere from the last event that arrived: Ray's own retries, which would begin again with
the files of the first attempt, are off.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

from ..files import LOCK, PART, write
from ..machine import cores
from .tasks import ATTEMPTS, Done, OnEvent, Shared, T, Task, attempt, died, log, portable

try:
    import ray
except ImportError as error:
    raise ImportError(
        'Ray is not installed: pip install "transformer-attention-bench[ray]"'
    ) from error

INHERITED = ("TAB_BACKEND", "TAB_ISA")  # variables that decide what computes a result


class Ray:
    """`address`: of a cluster this machine is a node of ("auto" finds it), or "local": a cluster of
    one node, for the time of the tasks. A task gets `cpus` cores, as many threads, `gpus` GPUs."""

    def __init__(self, address: str, cpus: float = 1, gpus: float = 0):
        if cpus <= 0 or gpus < 0:
            raise ValueError(f"cpus = {cpus}, gpus = {gpus}: give above 0, and 0 or more")
        if address.startswith("ray://"):
            raise ValueError(
                f"{address}: Ray's client cannot bring files back as they come; run TAB on a "
                "machine of the cluster, and give host:port of its head, or auto"
            )
        self.address, self.cpus, self.gpus = address, cpus, gpus

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        waiting, deaths = deque(range(len(tasks))), Counter()
        running: dict[ray.ObjectRefGenerator, int] = {}
        sent: dict[str, ray.ObjectRef] = {}
        with self._connected():
            try:
                while waiting or running:
                    # One more than there is room for: it starts without delay, and shows a cluster
                    # that can grow that it should.
                    while waiting and len(running) <= self._room():
                        index = waiting.popleft()
                        running[self._submit(index, tasks[index], sent)] = index
                    for stream in ray.wait(list(running), timeout=5)[0]:
                        index = running[stream]
                        try:
                            message = ray.get(next(stream))
                        except ray.exceptions.RayTaskError as error:  # it could not begin
                            del running[stream]
                            cause = RuntimeError(str(error.cause))
                            yield Done(index, error=cause, traceback=str(error))
                            continue
                        except (ray.exceptions.RayError, StopIteration) as error:
                            del running[stream]
                            deaths[index] += 1
                            why = f"its Ray worker or node died ({type(error).__name__})"
                            if deaths[index] < ATTEMPTS:
                                log.warning("%s: %s; it goes on", tasks[index].name, why)
                                waiting.appendleft(index)
                            else:
                                yield died(index, why)
                            continue
                        message.write(tasks[index])
                        if message.end is None:
                            on_event(index, message.event)
                        else:
                            del running[stream]
                            yield message.end
            finally:
                for stream in running:
                    with contextlib.suppress(ray.exceptions.RayError):
                        ray.cancel(stream, force=True)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        if ray.is_initialized():  # by the caller, who also ends it
            yield
            return
        local, options = self.address == "local", {}
        if local:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
            options = {"num_cpus": cores(), "include_dashboard": False}
        if variables := {name: os.environ[name] for name in INHERITED if name in os.environ}:
            options["runtime_env"] = {"env_vars": variables}
        host, _, port = self.address.rpartition(":")
        if port.isdigit():  # Ray itself would try for minutes
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            except OSError as error:
                raise ConnectionError(
                    f"no Ray cluster answers at {self.address}: {error}"
                ) from None
        ray.init(self.address, log_to_driver=False, logging_level="WARNING", **options)
        try:
            yield
        finally:
            ray.shutdown()

    def _room(self) -> int:
        """Tasks that the cluster, as it is now, can run at once."""
        needs = {"CPU": self.cpus, "GPU": self.gpus}
        needs = {name: need for name, need in needs.items() if need}

        def fit(has: dict[str, float]) -> int:
            return int(min(has.get(name, 0) // need for name, need in needs.items()))

        nodes = [fit(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        if not any(nodes):
            raise ValueError(
                f"no node of the Ray cluster has {self.cpus:g} CPU and {self.gpus:g} GPU, as each "
                "task asks for: add one that has, or ask for less"
            )
        return sum(nodes)

    def _submit(self, index: int, task: Task, sent: dict) -> ray.ObjectRefGenerator:
        shared = [argument for argument in task.arguments if isinstance(argument, Shared)]
        for item in shared:
            if item.key not in sent:
                sent[item.key] = ray.put(item.get())
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": 0}
        work = ray.remote(_work).options(
            num_returns="streaming", scheduling_strategy="SPREAD", **options
        )
        # A reference within a list is not fetched until the worker asks for it: once, if at all.
        shared = [(item, sent[item.key]) for item in shared]
        files = _Files(task).changed()
        return work.remote(index, task, files, shared, max(1, int(self.cpus)))


@dataclass(frozen=True)
class _Message:
    """From a worker: an event or, at last, the end; and what has changed in the folder."""

    files: dict[str, bytes]  # by name, the oldest first
    names: set[str]  # of all files that are there
    event: object = None
    end: Done | None = None

    def write(self, task: Task) -> None:
        """In the order they were written there, so that a crash here is one there."""
        for name, content in self.files.items():
            path = task.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)
        for name in _Files(task).names() - self.names:
            (task.folder / name).unlink()


class _Files:
    """The files that are a task's: not its lock, nor what is half written."""

    def __init__(self, task: Task):
        self.folder, self.stamps = task.folder, {}
        self.roots = [task.folder / part for part in task.parts] or [task.folder]

    def names(self) -> set[str]:
        return {
            path.relative_to(self.folder).as_posix()
            for root in self.roots
            for path in root.rglob("*")
            if path.is_file() and path.name != LOCK and path.suffix != PART
        }

    def changed(self) -> dict[str, bytes]:
        """Those that are new or another since the last call, the oldest first."""
        states = {name: (self.folder / name).stat() for name in self.names()}
        stamps = {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in states.items()}
        new = [name for name in stamps if stamps[name] != self.stamps.get(name)]
        self.stamps = stamps
        return {name: (self.folder / name).read_bytes() for name in sorted(new, key=stamps.get)}


def _work(
    index: int, task: Task, files: dict[str, bytes], shared: list, threads: int
) -> Iterator[_Message]:
    """On the node. The task runs in a thread of its own, so that its calls of emit become what
    this generator yields; each waits until the one before has been taken."""
    import torch

    for item, reference in shared:
        item.get(load=lambda reference=reference: ray.get(reference))
    messages: Queue[_Message] = Queue(maxsize=1)
    with _scratch() as scratch:
        here = replace(task, folder=scratch)
        _Message(files, set(files)).write(here)
        there = _Files(here)
        there.changed()

        def send(**what: object) -> None:
            messages.put(_Message(there.changed(), there.names(), **what))

        def run() -> None:
            torch.set_num_threads(threads)
            done = attempt(index, here, lambda event: send(event=event))
            send(end=portable(done))

        threading.Thread(target=run, daemon=True).start()
        while True:
            yield (message := messages.get())
            if message.end is not None:
                return


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder of this node for one task; also removes those of workers that were killed."""
    root = Path(tempfile.gettempdir()) / f"tab-ray-{os.getuid()}"
    root.mkdir(exist_ok=True)
    for old in root.iterdir():
        try:
            os.kill(int(old.name), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
    scratch = root / str(os.getpid())
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
