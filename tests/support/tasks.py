"""Tasks for the tests of the executors: functions of a module, as another process needs them."""

import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tab.files import write


@contextmanager
def threads(number: int):
    """Sums in another order are other sums: bit for bit needs the same number of threads."""
    import torch  # not by the processes whose tasks are below: it takes seconds

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count(steps: int, *, folder: Path, emit) -> int:
    """Counts in its folder, and goes on from there."""
    path = folder / "count"
    while (done := int(path.read_text()) if path.exists() else 0) < steps:
        write(path, str(done + 1).encode())
        emit(done + 1)
    return done


def count_and_die_at(fatal: list[int], steps: int, *, folder: Path, emit) -> int:
    """As count, but SIGKILL as soon as it has reached one of `fatal`."""

    def told(done: int) -> None:
        emit(done)
        if done in fatal:
            time.sleep(0.3)  # on Ray: for the file to have been brought back
            os.kill(os.getpid(), signal.SIGKILL)

    return count(steps, folder=folder, emit=told)


def fail(message: str, *, folder: Path, emit) -> None:
    emit("before")
    raise ValueError(message)


def facts(shared, *, folder: Path, emit) -> dict:
    """What a task sees of where it runs."""
    import torch

    return {
        "process": os.getpid(),
        "shared": shared.get(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def has_torch(*, folder: Path, emit) -> bool:
    return "torch" in sys.modules


def wait_forever(*, folder: Path, emit) -> None:
    emit(os.getpid())
    time.sleep(3600)


def alive(process: int) -> bool:
    """Whether it runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds: float) -> bool:
    """Waits for `true()`, at most so long."""
    end = time.monotonic() + seconds
    while not (said := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return said


def children(process: int) -> list[int]:
    """Its workers: not the one that Python starts to keep count of resources."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == process and "spawn_main" in command:
            found.append(int(path.name))
    return found


def count_slowly(steps: int, seconds: float, *, folder: Path, emit) -> int:
    """As count; each event says on which Ray node."""
    import ray

    def told(done: int) -> None:
        emit((ray.get_runtime_context().get_node_id(), done))
        time.sleep(seconds)

    return count(steps, folder=folder, emit=told)


def count_and_be_preempted_at(fatal: int, steps: int, *, folder: Path, emit) -> int:
    """As count; SLURM's warning comes once, when it has reached `fatal`."""

    def told(done: int) -> None:
        emit(done)
        if done == fatal:
            os.kill(os.getpid(), signal.SIGUSR2)

    return count(steps, folder=folder, emit=told)
