"""Which executor the options of the command line ask for."""

from __future__ import annotations

from .processes import Processes
from .tasks import Executor, InProcess


def executor(
    jobs: int = 1,
    ray: str | None = None,
    *,
    slurm: str | None = None,
    threads: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Executor:
    """What the command line's options ask for: `jobs` processes, a Ray cluster at the address `ray`
    ("local": one started here, for the time of the tasks), or SLURM with the settings `slurm`; the
    latter two with cpus and gpus for each task.

    ValueError: more than one, or a number out of range. ImportError: Ray or submitit is not
    installed.
    """
    for name, value in (("Ray", ray), ("SLURM", slurm)):
        if value is not None and (jobs != 1 or threads is not None):
            raise ValueError(
                f"jobs = {jobs}, threads = {threads} and {name.lower()} = {value!r}: {name} itself "
                "decides how many tasks run at once, each with the cores it asks for; drop jobs "
                "and threads"
            )
    if ray is not None and slurm is not None:
        raise ValueError(f"ray = {ray!r} and slurm = {slurm!r}: give one of the two")
    if ray is not None:
        from .ray_cluster import Ray

        return Ray(ray, cpus=cpus, gpus=gpus)
    if slurm is not None:
        from .slurm import Slurm

        return Slurm(slurm, cpus=cpus, gpus=gpus)
    if jobs == 1 and threads is None:
        return InProcess()
    return Processes(jobs, threads)
