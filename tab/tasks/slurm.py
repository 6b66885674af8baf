"""Tasks as jobs of a SLURM cluster, submitted by submitit. All nodes must see the results' disk.

A job works in its task's own folder, tells its events in a file, and leaves its end as submitit
keeps it; the driver reads both. So a node that dies costs what came after the last event, and a job
that reaches its time limit or is preempted goes on by itself: SLURM warns it, and submitit puts it
into the queue again.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checks import check_keys
from ..machine import cores
from .processes import variables
from .tasks import ATTEMPTS, Done, OnEvent, T, Task, attempt, died, log, portable

try:
    import submitit
    from submitit.core.utils import UncompletedJobError
except ImportError as error:
    raise ImportError(
        'submitit is not installed: pip install "transformer-attention-bench[slurm]"'
    ) from error

FOLDER = "jobs"  # beside the tasks' folders: what submitit keeps of each job, its logs among it
GENERIC = ("timeout_min", "mem_gb")  # under submitit's own names
OPTIONS = submitit.SlurmExecutor._valid_parameters()
MINUTES = 240  # a job's time limit unless the settings state one


class Slurm:
    """`settings`: "partition=gpu,timeout_min=120,at_once=8", or "local": processes of this machine
    in place of jobs. A task gets `cpus` cores, as many threads, and `gpus` GPUs.

    at_once: the most jobs that are submitted at a time; by default all, "local" what the cores do.
    timeout_min, mem_gb: as submitit has them. All others are options of sbatch, without dashes.
    """

    def __init__(self, settings: str, cpus: float = 1, gpus: float = 0):
        if cpus < 1 or gpus < 0 or cpus != int(cpus) or gpus != int(gpus):
            raise ValueError(
                f"cpus = {cpus:g}, gpus = {gpus:g}: SLURM gives a job whole ones, at least one CPU"
            )
        local = settings == "local"
        self.cluster, self.given = ("local", {}) if local else ("slurm", _parsed(settings))
        check_keys("--slurm", self.given, ["at_once", *GENERIC, *sorted(OPTIONS)])
        if not local and submitit.SlurmExecutor.affinity() < 0:
            raise ValueError(
                "this is no machine of a SLURM cluster: run TAB where sbatch and srun are, or try "
                "--slurm local"
            )
        self.cpus, self.gpus = int(cpus), int(gpus)
        every = max(1, cores() // self.cpus) if local else 10**9
        self.at_once = self.given.pop("at_once", every)
        if not isinstance(self.at_once, int) or self.at_once < 1:
            raise ValueError(f"at_once = {self.at_once!r}: give a number of jobs, at least 1")

    def run(self, tasks: Sequence[Task[T]], on_event: OnEvent) -> Iterator[Done[T]]:
        if not tasks:
            return
        waiting, deaths = deque(range(len(tasks))), Counter()
        folder = Path(os.path.commonpath([task.folder.resolve().parent for task in tasks])) / FOLDER
        executor = self._executor(folder)
        running: dict[int, _Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.at_once:
                    index = waiting.popleft()
                    running[index] = _Job(executor, folder, index, tasks[index], self.cpus)
                for index, job in list(running.items()):
                    ended = job.job.done()  # asked first: what it told until then is there
                    for event in job.events():
                        on_event(index, event)
                    if not ended:
                        continue
                    del running[index]
                    try:
                        yield job.job.result()
                    except UncompletedJobError:
                        deaths[index] += 1
                        why = f"its job {job.job.job_id} ended without a result (logs in {folder})"
                        if deaths[index] < ATTEMPTS:
                            log.warning("%s: %s; it goes on", tasks[index].name, why)
                            waiting.appendleft(index)
                        else:
                            yield died(index, why)
                time.sleep(0.2 if self.cluster == "local" else 2)
        finally:
            for job in running.values():
                job.job.cancel(check=False)

    def _executor(self, folder: Path) -> submitit.AutoExecutor:
        executor = submitit.AutoExecutor(
            folder, cluster=self.cluster, slurm_max_num_timeout=ATTEMPTS
        )
        named = {k if k in GENERIC else f"slurm_{k}": v for k, v in self.given.items()}
        named = {"name": "tab", "timeout_min": MINUTES, "cpus_per_task": self.cpus, **named}
        if self.gpus:
            named["gpus_per_node"] = self.gpus
        executor.update_parameters(**named)
        return executor


class _Job:
    """A task that was submitted, and how far its events have been read."""

    def __init__(self, executor, folder: Path, index: int, task: Task, threads: int):
        self.told, self.read = folder / f"{uuid.uuid4().hex}.events", 0
        self.job = executor.submit(_Work(), index, task, self.told, threads)

    def events(self) -> Iterator[object]:
        """Those that came since the last call."""
        if not self.told.exists():
            return
        with self.told.open("rb") as file:
            file.seek(self.read)
            while len(head := file.read(8)) == 8:
                content = file.read(size := int.from_bytes(head))
                if len(content) < size:  # the rest is still under way
                    return
                self.read += 8 + size
                yield pickle.loads(content)


class _Work:
    """What a job does."""

    def __call__(self, index: int, task: Task, told: Path, threads: int) -> Done:
        os.environ.update(variables(threads))
        if "torch" in sys.modules:  # too late for them; else it may not be needed at all
            sys.modules["torch"].set_num_threads(threads)
        with told.open("ab", buffering=0) as file:

            def emit(event: object) -> None:
                content = pickle.dumps(event)
                file.write(len(content).to_bytes(8) + content)

            return portable(attempt(index, task, emit))

    def checkpoint(self, *arguments: object) -> submitit.helpers.DelayedSubmission:
        """When the time limit is near, or another job takes the place: the same again, which goes
        on from the task's folder."""
        return submitit.helpers.DelayedSubmission(_Work(), *arguments)


def _parsed(text: str) -> dict[str, int | float | str]:
    """{"partition": "gpu", "timeout_min": 120} of "partition=gpu,timeout_min=120"."""
    found: dict[str, int | float | str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise ValueError(
                f"--slurm {text!r}: give local, or settings such as "
                "partition=gpu,timeout_min=120,at_once=8"
            )
        found[key] = value
        for kind in (float, int):
            try:
                found[key] = kind(value)
            except ValueError:
                continue
    return found
