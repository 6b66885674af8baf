"""environment.json: what the numbers of a comparison or a sweep come from, and when, and how busy
the machine was."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

from .. import __version__
from ..data.load import Dataset
from ..doctor.doctor import available, cpu_name
from ..files.formats import read_json, write_json
from ..machine import command, environment, load, now

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}
COPY = "put a copy back, or start a new comparison"  # the way out of a damaged file


class DataFacts(TypedDict):
    """Which data set a result comes from."""

    name: str
    note: str
    fingerprint: str


class UsedData(DataFacts):
    """How many of its images a comparison trains, validates and tests on."""

    train: NotRequired[int]
    validation: NotRequired[int]
    test: NotRequired[int]
    classes: NotRequired[int]


class Machine(TypedDict):
    """What a result was computed on."""

    device: str
    threads: int
    load: NotRequired[float | None]


class Time(TypedDict):
    """When somebody worked on a comparison, and the load averages before and after."""

    command: str
    started: str
    load: float | None
    ended: NotRequired[str]  # not there after a kill
    load_at_end: NotRequired[float | None]


class Facts(Machine):
    """environment.json: what the numbers of a comparison or a sweep come from."""

    tab: str
    torch: str
    python: str
    cpu: str
    commit: str | None
    dataset: UsedData
    overrides: NotRequired[dict]  # of the recipe, by --set, --epochs, …
    times: NotRequired[list[Time]]


def made_with(out: Path, dataset: Dataset) -> dict:
    """The facts in environment.json; a ValueError if `out` was made with other data."""
    facts = read_json(out / "environment.json", Facts, COPY)
    was = facts["dataset"]
    if was["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"{out} was made with {was['name']} ({was['fingerprint']}), "
            f"not with {dataset.name} ({dataset.fingerprint}): give the same data"
        )
    return facts


@contextlib.contextmanager
def noted(out: Path) -> Iterator[None]:
    """Writes into environment.json when the work within began and ended, by which command, and how
    busy the machine was."""
    path = out / "environment.json"
    time = {"command": command(), "started": now(), "load": load()}
    before = read_json(path, Facts, COPY)
    times = [*before.get("times", []), time]
    write_json(path, {**before, "times": times})
    try:
        yield
    finally:
        time |= {"ended": now(), "load_at_end": load()}
        write_json(path, {**before, "times": times})


def facts_of(device: str, dataset: Dataset) -> dict:
    """environment.json: what the numbers come from."""
    return {
        "tab": __version__,
        "commit": commit(),
        "cpu": cpu_name(),
        **environment(device),
        "backends": available(),
        "command": command(),
        "dataset": {key: getattr(dataset, key) for key in ("name", "note", "fingerprint")}
        | {"train": len(dataset.train), "test": len(dataset.test)}
        | {"classes": len(dataset.classes)},
    }


def commit() -> str | None:
    """The git commit of the source tree; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
