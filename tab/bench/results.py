"""What a run leaves: one JSON and a picture."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch

from .. import __version__
from ..files import folder
from ..files.formats import check, read_json, reading, write_json
from .roofline import Roofline
from .rows import Row, worst_of

# Variables that hold TAB's kernels, or PyTorch's, to less than the machine has.
HOLDS = (
    "TAB_ISA",
    "TAB_BACKEND",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)


def environment(device: str) -> dict[str, object]:
    """What a figure depends on: machine, versions, threads, and the commit of the code, which is to
    be asked for before it runs: others may commit while it does."""
    facts: dict[str, object] = {
        "tab": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        **{key: os.environ[key] for key in HOLDS if os.environ.get(key)},
    }
    if device.startswith("cuda"):
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


class Record(TypedDict):
    """What is read of a result by name."""

    command: str
    environment: dict
    roofline: dict | None
    rows: list[dict]


def check_place(path: Path) -> None:
    """A ValueError unless a result can be written there, and a page and a picture beside it."""
    if path.suffix in (".html", ".png"):
        raise ValueError(
            f"{path}: this is for the JSON of the results, beside which a page and a picture of "
            f"the same name are put; give {path.with_suffix('.json')}"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give a file in it, such as {path / 'new.json'}")
    if path.exists() and not path.is_file():  # which would be replaced, a device, too
        raise ValueError(f"{path} is no file: give another place, such as new.json")
    try:
        tempfile.TemporaryFile(dir=folder(path.parent)).close()
    except FileExistsError:
        raise
    except OSError:
        raise ValueError(f"nothing can be written in {path.parent}: give another place") from None


def save(
    path: Path,
    rows: Iterable[Row],
    roofline: Roofline | None,
    environment: dict[str, object],
    command: str,
    load: dict | None = None,
) -> dict:
    """Writes the run atomically: everything that the tables are made of, each single time. Returns
    the record. roofline: None where nothing is compared with it. environment: as it was when the
    run began. load: of turns.Load."""
    record = {
        "command": command,
        "environment": environment,
        "load": load,
        "roofline": roofline.to_dict() if roofline else None,
        "rows": [asdict(row) for row in rows],
    }
    folder(path.parent)
    write_json(path, record)
    return record


def load(path: Path) -> tuple[dict, list[Row]]:
    """The record and its rows; a ValueError or OSError names a file that is not one of ours. Who
    gave NaN has no times, which files from before that was judged everywhere still hold."""
    way_out = "give a result of `tab bench --out`, or measure again"
    record = read_json(path, Record, way_out)
    with reading(path, way_out):
        rows = [Row(**check("a row", row, Row)) for row in record["rows"]]
    for row in rows:
        errors = [e for e in (row.error, row.gradient_error) if e is not None]
        if math.isnan(worst_of(errors) or 0):
            row.skipped, row.seconds = row.skipped or "wrong: gave NaN", {}
    return record, rows


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
