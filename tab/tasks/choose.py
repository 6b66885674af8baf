"""Which executor the options of the command line ask for."""

from __future__ import annotations

from .processes import Processes
from .tasks import Executor, InProcess


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
        from .ray_cluster import Ray

        return Ray(ray, cpus=cpus, gpus=gpus)
    if jobs == 1 and threads is None:
        return InProcess()
    return Processes(jobs, threads)
