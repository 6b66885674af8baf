"""What every compiled GPU kernel takes: shared memory, registers, spills, against the limits.

Triton: the launchers are called on meta tensors, and each launch they would make is compiled ahead
of time for each architecture instead. CUDA C++: read from the built library. Neither needs a GPU.

    tab doctor --kernels               # of the launches of the same sums those that ask for most
    tab doctor --kernels --arch all    # for each architecture, not only this machine's or sm_90
    tab doctor --kernels --every-launch    # every launch that its file in kernels/ names
    python -m tab.doctor.kernel_report linear local    # of these ops only
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from .kernel_compile import code_of
from .kernel_kept import Kept
from .kernel_launches import Launch, chosen, precision, without

# Compute capability -> bytes of shared memory that one block may ask for (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def own_arch() -> int:
    """The architecture of this machine's GPU where its limits are known, otherwise 90 (H100)."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    arch = 10 * major + minor
    return arch if arch in SHARED_LIMIT else 90


# --- Triton ---------------------------------------------------------------------------------------


def compiled(op: str, launch: Launch, arch: int) -> dict:
    """One row of the report."""
    kernel, _, options = launch
    code = code_of(launch, arch)
    kind = next(x for x in launch.types if x.startswith("*"))[1:]
    config = " ".join(f"{k}={v}" for k, v in options.items() if k not in ("MAP", "REVERSE"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = next(iter(_usage(Path(file.name)).values()))
    return {
        "op": op, "kernel": kernel.__name__, "config": f"{kind} {config}",
        "without": without(launch), "arch": arch, "precision": precision(launch), **usage,
        "shared": code.metadata.shared, "limit": SHARED_LIMIT[arch],
        **resident(arch, usage["registers"], code.metadata.shared, code.metadata.num_warps),
    }  # fmt: skip


def _compiled(item: tuple[str, Launch, int]) -> dict:
    return compiled(*item)


def resident(arch: int, registers: int, shared: int, warps: int) -> dict[str, int]:
    """Blocks, of `warps` each, and warps of 64 that one multiprocessor holds at once: as many as
    its 65,536 registers, given out to a warp by 256, and its shared memory take, 1 KiB of which
    each block has for the system (CUDA C++ Programming Guide, "Compute Capabilities")."""
    by_registers = 65536 // (32 * warps * -(-registers // 8) * 8)
    by_memory = (SHARED_LIMIT[arch] + 1024) // (shared + 1024)
    blocks = min(by_registers, by_memory, 64 // warps)
    return {"blocks": blocks, "warps": warps * blocks}


def _cuobjdump() -> str:
    """CUDA's cuobjdump, else the one Triton ships."""
    import triton.backends.nvidia as nvidia

    return shutil.which("cuobjdump") or str(Path(nvidia.__file__).parent / "bin/cuobjdump")


def _usage(binary: Path) -> dict[tuple[str, int], dict]:
    """(kernel, arch) -> registers, bytes of local memory a thread (stack: spills and arrays the
    compiler could not keep in registers) and of static shared memory."""
    text = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", str(binary)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found, arch = {}, 0
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found[name, arch] = {"registers": registers, "spilled": stack + local, "shared": shared}
    return found


# --- CUDA C++ -------------------------------------------------------------------------------------


def op_of(problem: str) -> str:
    """What the name of a CUDA C++ problem begins with: its op, or what two of them share."""
    word = re.match(r"[A-Z][a-z]+", problem)[0].lower()
    return "local sparse" if word == "softmax" else word


def built() -> list[dict]:
    """Rows of the kernels in tab._C_cuda; none when it was not built."""
    found = sorted(Path(__file__).parents[1].glob("_C_cuda.*so"))
    rows = []
    for (symbol, arch), usage in _usage(found[0]).items() if found else ():
        name = torch._C._demangle(symbol)
        # run<tab::few::LinearForward<float>, 128, 199168l>: problem, threads, most shared memory
        problem, kind, threads, shared = re.search(r"::(\w+)<(\w+)>, (\d+), (\d+)", name).groups()
        memory = usage["shared"] + int(shared)
        rows.append({
            "op": op_of(problem), "kernel": f"cuda {problem}",
            "config": f"{kind} threads={threads}", "without": "",
            "arch": arch, "precision": kind, **usage, "shared": memory,
            "limit": SHARED_LIMIT[arch],
            **resident(arch, usage["registers"], memory, int(threads) // 32),
        })  # fmt: skip
    return rows


# --- public ---------------------------------------------------------------------------------------


def report_rows(
    archs: tuple[int, ...] = tuple(SHARED_LIMIT),
    ops: Set[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    every: bool = False,
) -> list[dict]:
    """One row for each kernel, configuration and architecture: op, kernel, config, arch, precision
    (of its products), registers (a thread), spilled (bytes of local memory a thread), shared and
    limit (bytes a block), blocks and warps (that a multiprocessor holds at once; below 16 warps
    little hides the wait for memory).

    Compiles what is not known from an earlier report of the same sources: minutes when nothing is.
    ops: only these, by the names of their files in kernels/. progress: told (done, total, what).
    every: each launch that those name, and not only those that ask for most.
    """
    work = [
        (op, launch, arch)
        for arch in archs
        for op, found in chosen(arch, every, ops).items()
        for launch in found
    ]
    kept, rows = Kept(), []
    known = [kept.get(*item) for item in work]
    missing = [item for item, row in zip(work, known, strict=True) if row is None]
    with _workers(min(os.cpu_count() or 1, len(missing))) as each:
        try:
            found = iter(each(_compiled, missing))
            for item, row in zip(work, known, strict=True):
                if row is None:
                    row = next(found)
                    kept.add(*item, row)
                rows.append(row)
                if progress:
                    progress(len(rows), len(work), f"{row['kernel']}, sm_{row['arch']}")
        finally:  # what was found before Control-C is kept, too
            kept.save()
    both = [row for row in built() if row["arch"] in archs]
    return rows + [row for row in both if ops is None or not ops.isdisjoint(row["op"].split())]


@contextmanager
def _workers(count: int) -> Iterator[Callable]:
    """`map`, in so many processes where they are several: Triton compiles under Python's lock."""
    if count < 2:
        yield map
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "triton"])
    with ProcessPoolExecutor(count, context, _begin, (dict(os.environ),)) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(environment: dict[str, str]) -> None:
    """In a new process, which leaves Control-C to the caller and does not outlive it."""
    os.environ.update(environment)
    gc.freeze()  # what is loaded stays: to look through it again and again was a twentieth of all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()


def _end_with_caller() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def print_kernel_report(rows: list[dict] | None = None) -> None:
    """The report as aligned text; `!` marks a row that spills or does not fit."""
    rows = report_rows() if rows is None else rows
    lines = [tuple(rows[0])] + [tuple(map(str, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    bad = [False] + [row["spilled"] > 0 or row["shared"] > row["limit"] for row in rows]
    for line, mark in zip(lines, bad, strict=True):
        cells = (x.ljust(width) for x, width in zip(line, widths, strict=True))
        print("!" if mark else " ", *cells)


if __name__ == "__main__":
    print_kernel_report(report_rows(ops=set(sys.argv[1:]) or None))
