"""What a run leaves: one JSON, a table for the terminal, a picture."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
from rich.table import Table

from .. import __version__
from ..formats import check, read_json, reading, write_json
from .peak_memory import growth, tokens
from .roofline import Roofline
from .rows import DIRECTIONS, Row, percentiles, row_speedup


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


def tables(rows: list[Row]) -> list[Table]:
    """One table a case: milliseconds (median, p10–p90), our speed-up over it, rates, % of floor."""
    return [_table(case, group) for case, group in _grouped(rows).items()]


def _table(case: str, rows: list[Row]) -> Table:
    table = Table(title=case, title_justify="left")
    table.add_column("contestant")
    directions = [d for d in DIRECTIONS if any(d in row.seconds for row in rows)]
    for d in directions:
        table.add_column(f"{d} ms", justify="right")
        table.add_column("tab is ×", justify="right")
    for title in ("GFLOP/s", "GB/s", "% of floor", "peak MB", "error", "gradient"):
        table.add_column(title, justify="right")
    base = rows[0]
    for row in rows:
        if row.skipped:
            continue
        cells = [row.contestant]
        for d in directions:
            if d not in row.seconds:
                cells += ["–", "–"]
                continue
            low, mid, high = (1e3 * x for x in percentiles(row.seconds[d]))
            cells += [f"{mid:.2f} ({low:.2f}–{high:.2f})", _ratio(row, base, d)]
        last = directions[0]
        seconds = percentiles(row.seconds[last])[1] if last in row.seconds else float("nan")
        cells += [
            f"{row.flops[last] / seconds / 1e9:.1f}",
            f"{row.moved[last] / seconds / 1e9:.1f}",
            f"{100 * row.floor[last] / seconds:.0f}",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            _number(row.error),
            _number(row.gradient_error),
        ]
        table.add_row(*cells)
    absent = [f"{row.contestant}: {row.skipped}" for row in rows if row.skipped]
    table.caption, table.caption_justify = "\n".join(absent), "left"
    return table


def _ratio(row: Row, base: Row, direction: str) -> str:
    if row is base or direction not in base.seconds:
        return ""
    low, mid, high = row_speedup(row, base, direction)
    return f"{mid:.2f} ({low:.2f}–{high:.2f})"


def steps_table(rows: list[Row]) -> Table:
    """A model's training steps: images/s (median, p10–p90), ratios of steps in the same round, and
    the peak of memory where it was measured."""
    table = Table(title=rows[0].case, title_justify="left")
    columns = ["attention", "images/s", "ms", "× control", "tab is × eager"]
    memory = any(row.peak_bytes for row in rows)
    for title in (*columns, *["peak MB"] * memory, "difference"):
        table.add_column(title, justify="left" if title == "attention" else "right")
    timed = {row.contestant: row for row in rows}
    for row in rows:
        if row.skipped:
            table.add_row(row.contestant, row.skipped)
            continue
        times = row.seconds["step"]
        low, mid, high = percentiles(times)
        rates = [f"{row.batch / x:,.0f}" for x in (mid, high, low)]
        control, eager = timed["none"], timed.get(row.contestant.replace("tab ", "eager ", 1))
        over = row_speedup(row, control, "step") if row is not control else None
        wins = None
        if row.contestant.startswith("tab ") and eager and not eager.skipped:
            wins = row_speedup(eager, row, "step")
        table.add_row(
            row.contestant,
            f"{rates[0]} ({rates[1]}–{rates[2]})",
            f"{1e3 * mid:.1f}",
            *("" if r is None else f"{r[1]:.2f} ({r[0]:.2f}–{r[2]:.2f})" for r in (over, wins)),
            *["" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"] * memory,
            "" if row.error is None else _number(max(row.error, row.gradient_error)),
        )
    return table


def memory_table(rows: list[Row]) -> Table:
    """Peak MB of one op for each N, and the exponent of its growth."""
    table = Table(title=f"{rows[0].case.split('/')[0]}: peak MB, forward + backward")
    table.title_justify = "left"
    lengths = sorted({tokens(row) for row in rows})
    for title in ("contestant", *(f"N {n}" for n in lengths), "grows as"):
        table.add_column(title, justify="left" if title == "contestant" else "right")
    for name in dict.fromkeys(row.contestant for row in rows):
        mine = {tokens(row): row for row in rows if row.contestant == name}
        cells = [
            "–" if r.skipped else f"{r.peak_bytes / 1e6:,.1f}" for _, r in sorted(mine.items())
        ]
        exponent = growth(list(mine.values()))
        table.add_row(name, *cells, "–" if exponent is None else f"N^{exponent:.2f}")
    notes = [f"{r.contestant} at {r.case}: {r.skipped}" for r in rows if r.skipped]
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.0e}"


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
