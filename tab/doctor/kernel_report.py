"""What every compiled GPU kernel takes: shared memory, registers, spills, against the limits.

Triton: the launchers are called on meta tensors, and each launch they would make is compiled ahead
of time for each architecture instead. CUDA C++: read from the built library. Neither needs a GPU.

    python -m tab.kernel_report
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .kernel_launches import LAUNCHERS

# Compute capability -> bytes of shared memory that one block may ask for (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPTIONS = ("num_warps", "num_stages")

# --- Triton: which launches -----------------------------------------------------------------------


def launches(op: str) -> list[tuple]:
    """The distinct launches of an op: (kernel, positional arguments, options)."""
    from ..kernels import _common

    seen: dict[str, tuple] = {}

    def record(kernel, grid, *args, **options):
        key = f"{kernel.__name__} {[_type(x) for x in args]} {sorted(options.items())}"
        seen.setdefault(key, (kernel, args, options))

    with _common.recording(record):
        LAUNCHERS[op]()
    return list(seen.values())


def _type(x) -> str:
    """Triton's name of an argument's type; None and 1 are compiled in."""
    if isinstance(x, torch.Tensor):
        short = {
            "float32": "fp32",
            "float16": "fp16",
            "bfloat16": "bf16",
            "uint8": "u8",
            "int8": "i8",
            "int32": "i32",
            "int64": "i64",
        }
        return "*" + short[str(x.dtype).removeprefix("torch.")]
    if x is None or (x == 1 and isinstance(x, int)):
        return "constexpr"
    return "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"


# --- Triton: compiling ----------------------------------------------------------------------------


def _compile(op: str, kernel, args: tuple, options: dict, arch: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in options.items() if name not in OPTIONS}
    signature, aligned = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = _type(x)
        if signature[name] == "constexpr":
            constants[name] = x
        elif isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kernel.arg_names[len(args) :], "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={name: options[name] for name in OPTIONS if name in options},
    )
    kind = next((_type(x)[1:] for x in args if isinstance(x, torch.Tensor)), "")
    config = " ".join(f"{k}={v}" for k, v in options.items() if k not in ("MAP", "REVERSE"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = next(iter(_usage(Path(file.name)).values()))
    return {
        "op": op, "kernel": kernel.__name__, "config": f"{kind} {config}", "arch": arch,
        "registers": usage["registers"], "spilled": usage["spilled"],
        "shared": compiled.metadata.shared, "limit": SHARED_LIMIT[arch],
    }  # fmt: skip


def _compile_in_thread(*launch) -> dict:
    """Python 3.11 counts the depth of ast.parse for all threads together, and raises SystemError
    when two of them parse at once (python/cpython#106905): then it is simply tried again."""
    for _ in range(20):
        try:
            return _compile(*launch)
        except Exception as error:
            cause: BaseException | None = error  # Triton raises its own error from it
            while cause and "recursion depth mismatch" not in str(cause):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
    return _compile(*launch)


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

CUDA_OPS = {  # what a problem's name begins with
    "Linear": "linear",
    "Mla": "mla",
    "Performer": "performer",
    "PerformerState": "performer",
    "Softmax": "local sparse",
}


def built() -> list[dict]:
    """Rows of the kernels in tab._C_cuda; none when it was not built."""
    found = sorted(Path(__file__).parents[1].glob("_C_cuda.*so"))
    rows = []
    for (symbol, arch), usage in _usage(found[0]).items() if found else ():
        name = torch._C._demangle(symbol)
        # run<tab::few::LinearForward<float>, 128, 199168l>: problem, threads, most shared memory
        problem, kind, threads, shared = re.search(r"::(\w+)<(\w+)>, (\d+), (\d+)", name).groups()
        op = next(op for start, op in CUDA_OPS.items() if problem.startswith(start))
        rows.append({
            "op": op, "kernel": f"cuda {problem}", "config": f"{kind} threads={threads}",
            "arch": arch, "registers": usage["registers"], "spilled": usage["spilled"],
            "shared": usage["shared"] + int(shared), "limit": SHARED_LIMIT[arch],
        })  # fmt: skip
    return rows


# --- public ---------------------------------------------------------------------------------------


def kernel_report(archs: tuple[int, ...] = tuple(SHARED_LIMIT)) -> list[dict]:
    """One row for each kernel, configuration and architecture: op, kernel, config, arch, registers
    (a thread), spilled (bytes of local memory a thread), shared and limit (bytes a block).

    Compiles what Triton's cache does not hold; minutes when it holds nothing and cores are few.
    """
    work = [(op, *launch, arch) for op in LAUNCHERS for launch in launches(op) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda item: _compile_in_thread(*item), work))
    return rows + [row for row in built() if row["arch"] in archs]


def print_kernel_report(rows: list[dict] | None = None) -> None:
    """The report as aligned text; `!` marks a row that spills or does not fit."""
    rows = kernel_report() if rows is None else rows
    lines = [tuple(rows[0])] + [tuple(map(str, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    bad = [False] + [row["spilled"] > 0 or row["shared"] > row["limit"] for row in rows]
    for line, mark in zip(lines, bad, strict=True):
        cells = (x.ljust(width) for x, width in zip(line, widths, strict=True))
        print("!" if mark else " ", *cells)


if __name__ == "__main__":
    print_kernel_report()
