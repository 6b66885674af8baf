"""`tab bench memory`: the peak memory of forward + backward against N, and how it grows.

Each point is measured in a process of its own, forked from one that has only imported: nothing
that an allocator or a kernel kept from an earlier point can hide what this one needs. The peak is
the resident high-water mark above the inputs: outputs, gradients, masks, scratch.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .benchmark import Contestant
from .cases import Case
from .measure import call, peak
from .registry import benchmark, problem
from .rows import Row

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
COMPILED = ("compile", "flex")  # what they allocate while compiling would count


def entrants(op: str) -> list[str]:
    """TAB, and what of eager PyTorch computes the same."""
    given = benchmark(op).pytorch(problem(Case(op, "tiny")))
    return ["tab", *(c.name for c in given if not any(word in c.name for word in COMPILED))]


def memory(
    op: str,
    lengths: tuple[int, ...] = LENGTHS,
    available: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row for each contestant and N, `peak_bytes` or the reason why it was not run.

    available: bytes that a point may take. A point is not run when the last one, grown as N², would
    not fit. Default: half of what the machine has free. progress: told each point before it is run.
    """
    available = free() / 2 if available is None else available
    rows = []
    for name in entrants(op):
        before: tuple[int, int] | None = None  # N, bytes
        for n in lengths:
            case = Case(op, f"n{n}")
            row = Row(case.name, name)
            rows.append(row)
            if progress:
                progress(f"{case.name} {name}")
            if before and (guess := before[1] * (n / before[0]) ** 2) > available:
                row.skipped = f"would take about {guess / 1e9:.0f} GB, {available / 1e9:.0f} may"
                continue
            row.peak_bytes = in_its_own_process(f"{name} at {case.name}", _point, case, name)
            before = n, row.peak_bytes
    return rows


def growth(rows: list[Row]) -> float | None:
    """e in peak ~ N^e, least squares over the logarithms; None of fewer than two points."""
    points = [(tokens(row), row.peak_bytes) for row in rows if row.peak_bytes]
    if len(points) < 2:
        return None
    n, size = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(n, size, 1)[0])


def tokens(row: Row) -> int:
    return int(row.case.split("/")[1].removeprefix("n"))


def in_its_own_process(what: str, measure: Callable[..., int], *args) -> int:
    """measure(*args) in a process that holds nothing yet. what: is measured, for errors.

    RuntimeError: it failed there, or its process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receive, send = context.Pipe(duplex=False)
    given = (send, torch.get_num_threads(), measure, *args)
    process = context.Process(target=_answer, args=given)
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{what} ended with code {process.exitcode}") from None
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{what}: {answer}")
    return answer


def _answer(send, threads: int, measure: Callable[..., int], *args) -> None:
    try:
        torch.set_num_threads(threads)
        # glibc: blocks from 64 kB on go back to the system when freed, so that only what is held
        # counts; by default it decides by what was freed before.
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 16)
        send.send(measure(*args))
    except Exception as error:  # it would only be printed here
        send.send(f"{type(error).__name__}: {error}")


def _point(case: Case, name: str) -> int:
    run(Case(case.op, "tiny"), name)  # libraries and thread stacks are there then
    return run(case, name)


def run(case: Case, name: str) -> int:
    p = problem(case)

    def find() -> Contestant:  # masks are made here: part of the cost
        return next(c for c in p.benchmark.contestants(p) if c.name == name)

    def both(entrant: Contestant) -> None:
        prepare, timed = call(entrant.build(p), p, "both")
        timed(prepare())

    return known_peak((find, both), case.device)


def known_peak(call: tuple[Callable, Callable], device: str) -> int:
    """`peak`, or a RuntimeError where the system cannot tell."""
    size = peak(call, device)
    if size is None:
        raise RuntimeError("this system does not tell peak memory (/proc/self/clear_refs)")
    return size


def free() -> int:
    """Bytes of memory that the system can still give."""
    with open("/proc/meminfo") as f:
        line = next(line for line in f if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def picture(rows: list[Row], path: Path) -> None:
    """Peak against N, both logarithmic, a panel for each op; dotted lines grow as N and N²."""
    from ..drawing.figures import Picture  # what only measures needs no matplotlib

    ops = list(dict.fromkeys(row.case.split("/")[0] for row in rows))
    figure = Picture(figsize=(3.2 * len(ops) + 1, 3.6), layout="tight")
    axes = figure.subplots(1, len(ops), sharey=True, squeeze=False)
    for axis, op in zip(axes[0], ops, strict=True):
        mine = [row for row in rows if row.case.startswith(f"{op}/") and row.peak_bytes]
        panel(axis, op, mine, lambda row: row.peak_bytes / 1e6)
    axes[0, 0].set_ylabel("peak MB, forward + backward")
    figure.keep(path, dpi=110)


# Okabe & Ito's, and more: told apart by everyone. Blue is ours alone.
_OURS = "#0072B2"
_OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#882255", "#777777", "#B2A300")


def panel(axis, op: str, mine: list[Row], value: Callable[[Row], float]) -> None:
    """A line for each contestant of one op against N, both logarithmic."""
    axis.set_prop_cycle(color=_OTHERS)
    for name in dict.fromkeys(row.contestant for row in mine):
        points = [(tokens(row), value(row)) for row in mine if row.contestant == name]
        style = {"color": _OURS, "linewidth": 2.2, "zorder": 3} if name == "tab" else {}
        axis.loglog(*zip(*points, strict=True), marker="o", label=name, **style)
    first, last = min(map(tokens, mine)), max(map(tokens, mine))
    base = min(value(row) for row in mine)
    for e in (1, 2):
        ends = [base, base * (last / first) ** e]
        axis.loglog([first, last], ends, ":", color="#999999", linewidth=1)
        axis.annotate(f"N{'²' if e == 2 else ''}", (last, ends[1]), color="#777777")
    ticks = sorted({tokens(row) for row in mine})
    axis.set_xticks(ticks, [str(n) for n in ticks], rotation=45, minor=False)
    axis.set_xticks([], minor=True)
    axis.set(title=op, xlabel="tokens N")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
