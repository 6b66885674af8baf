"""What a run leaves: one JSON and a picture."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch

from .. import __version__
from ..formats import check, read_json, reading, write_json
from .roofline import Roofline
from .rows import Row, percentiles


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
        **{key: os.environ[key] for key in ("TAB_ISA", "TAB_BACKEND") if os.environ.get(key)},
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def load(path: Path) -> tuple[dict, list[Row]]:
    """The record and its rows; a ValueError or OSError names a file that is not one of ours."""
    way_out = "give a result of `tab bench --out`, or measure again"
    record = read_json(path, Record, way_out)
    with reading(path, way_out):
        return record, [Row(**check("a row", row, Row)) for row in record["rows"]]


def picture(rows: list[Row], path: Path) -> None:
    """Horizontal bars: time over the floor of the machine, a panel per case, shorter is better."""
    from ..figures import Picture  # what only measures needs no matplotlib

    groups = {
        case: [row for row in group if row.seconds and not row.skipped]
        for case, group in _grouped(rows).items()
    }
    heights = [len(group) for group in groups.values()]
    size = (8, 0.9 + sum(0.36 * h + 0.7 for h in heights))
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
    for axis, (case, group) in zip(axes[:, 0], groups.items(), strict=True):
        direction = "both" if any("both" in row.seconds for row in group) else "forward"
        timed = [row for row in group if direction in row.seconds]
        over = [percentiles(row.seconds[direction])[1] / row.floor[direction] for row in timed]
        colours = ["#0072B2" if r.contestant.startswith("tab") else "#999999" for r in timed]
        axis.barh([row.contestant for row in timed], over, color=colours)
        for y, (row, x) in enumerate(zip(timed, over, strict=True)):
            ms = 1e3 * percentiles(row.seconds[direction])[1]
            axis.text(x, y, f" {ms:.3g} ms, {x:.1f}× floor", va="center", fontsize=8)
        axis.set(
            xscale="log",
            title=f"{case}, {'forward + ' * (direction == 'both')}"
            f"{'backward' if direction == 'both' else 'forward'}",
            xlim=(1, max(over) * 3),
        )
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time over the floor of this machine (log)")
    figure.keep(path, dpi=110)


def _grouped(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups


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
