"""Tasks for the tests of the executors: functions of a module, as another process needs them."""

import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from patience import until

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


def count_in(folder: Path) -> int:
    path = folder / "count"
    return int(path.read_text()) if path.exists() else 0


def count(steps: int, *, folder: Path, emit) -> int:
    """Counts in its folder, and goes on from there."""
    path = folder / "count"
    while (done := count_in(folder)) < steps:
        write(path, str(done + 1).encode())
        emit(done + 1)
    return done


def count_and_die_at(fatal: list[int], steps: int, home: Path, *, folder: Path, emit) -> int:
    """As count, but SIGKILL as soon as it has reached one of `fatal`, and `home`, the task's folder
    where the driver is, knows of it."""

    def told(done: int) -> None:
        emit(done)
        if done in fatal:
            assert until(lambda: count_in(home) == done)
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


def held_up(unit: str) -> None:
    """Says in the file `unit` who it is, and measures for ever."""
    Path(unit).with_suffix(".new").write_text(str(os.getpid()))
    Path(unit).with_suffix(".new").rename(unit)
    time.sleep(3600)


def alive(process: int) -> bool:
    """Whether it runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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


def count_on_nodes(steps: int, head: str, killed: Path, *, folder: Path, emit) -> int:
    """As count; each event says on which Ray node. After the third it waits for the other node to
    be killed, which on that one is for ever; on the head until the file `killed` is there."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def told(done: int) -> None:
        emit((node, done))
        if done == 3:
            until(lambda: node == head and killed.exists())

    return count(steps, folder=folder, emit=told)


def count_and_be_preempted_at(fatal: int, steps: int, *, folder: Path, emit) -> int:
    """As count; SLURM's warning comes once, when it has reached `fatal`."""

    def told(done: int) -> None:
        emit(done)
        if done == fatal:
            os.kill(os.getpid(), signal.SIGUSR2)

    return count(steps, folder=folder, emit=told)


def own_process(unit) -> list:
    """The row of a benchmark: its process is its time."""
    from tab.bench.rows import Row

    row = Row("c", "tab")
    row.timed("forward", [float(os.getpid())], [1.0])
    return [row]
