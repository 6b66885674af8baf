"""What is said before work: how long it will take, from a first step that is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import machine
from .terminal import bar, console, say


def say_time(
    runs: list[tuple[object, float]], dataset, device: str, executor=None, *, cluster: bool = False
) -> None:
    """runs: (config, the part of it that is still to be trained). Says nothing of what is done, or
    where no step could be timed; --quiet does without. executor: by default this process. cluster:
    it runs elsewhere, with as many workers as there are then. Runs with more threads than this
    machine has cores share them."""
    from ..train.estimate import estimate

    left = [(config, part) for config, part in runs if part > 0]
    if console.quiet or not left:
        return
    jobs, threads = getattr(executor, "jobs", 1), getattr(executor, "threads", None)
    with bar("first steps") as show, _threads(threads) as each:
        found = estimate(left, dataset, device, progress=show)
    if not found.measured:
        return
    which = "one step of each variant"
    if found.variants == 1:
        which = "one step"
    elif found.measured < found.variants:
        which = f"one step of {found.measured} of {found.variants} variants"
    crowd = 1.0 if cluster or device != "cpu" else max(1.0, jobs * each / machine.cores())
    text = f"It will take about {duration(found.seconds * crowd / jobs)}"
    if cluster:
        text += " of computing, shared among the workers of the cluster"
    elif (machine.load() or 0.0) > machine.cores():
        text += " while the machine is as busy as it is now"
    say(f"{text}: {which} was timed.")


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 20 min', '2 d 4 h': what an estimate is good for."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    return "{} d {} h".format(*divmod(round(seconds / 3600), 24))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """As many as each run will have."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)
