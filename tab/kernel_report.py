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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Compute capability -> bytes of shared memory that one block may ask for (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPTIONS = ("num_warps", "num_stages")

# --- Triton: which launches -----------------------------------------------------------------------


def _batches() -> None:
    from .kernels import batches

    shapes = ((50000, 32, 32, 3), torch.uint8), ((512,), torch.int64), ((512, 3), torch.int8)
    x = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    batches.assemble(*x, *torch.empty(2, 3, device="meta"))


def _linear() -> None:
    """Calls the launchers of `linear` once for each way they go."""
    from .kernels import linear, linear_backward

    both, full = (torch.float32, torch.bfloat16), (torch.float32,)
    cases = [  # B, H, N, D, Dv, causal, types
        (512, 8, 64, 64, 64, False, both),  # one launch
        (512, 8, 64, 128, 128, False, full),  # one launch forward, split backward
        (1, 8, 8192, 64, 64, True, both),  # one tile across D
        (1, 8, 8192, 256, 256, True, full),  # several
    ]
    for b, h, n, d, dv, causal, dtypes in cases:
        for dtype in dtypes:
            q = torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
            v = torch.empty(b, n, h, dv, dtype=dtype, device="meta").transpose(1, 2)
            mask = torch.empty(b, n, dtype=torch.bool, device="meta")
            s0 = torch.empty(b, h, d, dv, device="meta")
            z0 = torch.empty(b, h, d, device="meta")
            o, s, z = linear.forward(q, q, v, mask, s0, z0, 0, causal, 0.0)
            linear_backward.backward(o, s, z, q, q, v, o, s, z, mask, s, z, 0, causal, 0.0)


def _performer() -> None:
    """Calls the launchers of `performer` once for each way they go."""
    from .kernels import performer, performer_backward

    half, full = torch.bfloat16, torch.float32
    cases = [  # B, H, N, D, Dv, M, causal, type
        (512, 8, 64, 64, 64, 256, False, half),  # one launch
        (512, 8, 64, 64, 64, 256, False, full),
        (1, 8, 8192, 64, 64, 256, True, half),  # segments
        (1, 8, 8192, 256, 256, 512, True, full),  # several tiles of everything
    ]
    for b, h, n, d, dv, m, causal, dtype in cases:
        q = torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
        v = torch.empty(b, n, h, dv, dtype=dtype, device="meta").transpose(1, 2)
        w = torch.empty(m, d, device="meta")
        mask = torch.empty(b, n, dtype=torch.bool, device="meta")
        z0 = torch.empty(b, h, m, device="meta")
        state = torch.empty(b, h, m, dv, device="meta"), z0, z0
        o, s, z, c, lse = performer.forward(q, q, v, w, mask, *state, 0, causal, 0.0)
        performer_backward.backward(o, s, z, q, q, v, w, o, s, z, c, lse, mask, *state, 0, causal)


def _heads(n: int, *sizes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Token-major (2, 8, n, size) without memory."""
    return [torch.empty(2, n, 8, s, dtype=dtype, device="meta").transpose(1, 2) for s in sizes]


SOFTMAX = (  # D = Dv, type: a head in one tile and in several
    (64, torch.bfloat16),
    (64, torch.float32),
    (128, torch.bfloat16),
    (256, torch.bfloat16),
)


def _local() -> None:
    """Line and causal grid."""
    from .kernels import local

    for d, dtype in SOFTMAX:
        q, lse = *_heads(8192, d, dtype=dtype), torch.empty(2, 8, 8192, device="meta")
        for rows, cols in ((0, 0), (128, 64))[: 2 if (d, dtype) == SOFTMAX[0] else 1]:
            options = 64, 64, rows, cols, cols > 0, 0.1
            local.forward(q, q, q, *options)
            local.backward(q, q, q, q, q, lse, *options)


def _sparse() -> None:
    """Causal, with long rows."""
    from .kernels import sparse, sparse_backward

    ptr, entries = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((8, 129), 9999))
    for d, dtype in SOFTMAX:
        q, lse = *_heads(8192, d, dtype=dtype), torch.empty(2, 8, 8192, device="meta")
        options = ptr, entries, ptr, entries, 64, True, 0.1
        sparse.forward(q, q, q, *options)
        sparse_backward.backward(q, q, q, q, q, lse, *options)


def _mla() -> None:
    """Calls the launchers of `mla` once for each way they go."""
    from .kernels import mla, mla_backward, mla_decode

    both, half = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    cases = [  # B, H, N, Dn, Dr, R, Dv, causal, types
        (512, 8, 64, 48, 16, 128, 64, False, both),  # bfloat16: one tile
        (1, 128, 256, 128, 64, 512, 128, True, half),  # DeepSeek-V3
        (1, 8, 256, 128, 64, 512, 128, True, (torch.float32,)),  # float32's widest
        (1, 8, 256, 256, 128, 512, 256, True, (torch.float16, torch.bfloat16)),  # and the halves'
    ]
    for b, h, n, dn, dr, r, dv, causal, dtypes in cases:
        for dtype in dtypes:
            shapes = (b, h, n, dn), (b, h, n, dr), (b, n, r), (b, n, dr), (h, dn, r), (h, dv, r)
            x = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            mask = torch.empty(b, n, dtype=torch.bool, device="meta")
            o, lse, _ = mla.forward(*x, mask, 0.1, causal)
            mla_backward.backward(o, lse, *x, o, lse, mask, 0.1, causal)
    for h, r, dtypes in ((128, 512, both), (16, 64, half), (128, 576, both)):
        for dtype in dtypes:
            shapes = (1, h, 128), (1, h, 64), (1, 8192, r + 64), (1,), (h, 128, r), (h, 128, r)
            x = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            x[3] = x[3].int()
            mla_decode.decode(*x, 0.1)


LAUNCHERS: dict[str, Callable[[], None]] = {
    "batches": _batches,
    "linear": _linear,
    "performer": _performer,
    "local": _local,
    "sparse": _sparse,
    "mla": _mla,
}


def launches(op: str) -> list[tuple]:
    """The distinct launches of an op: (kernel, positional arguments, options)."""
    from .kernels import _common

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

CUDA_OPS = {"Linear": "linear", "Softmax": "local sparse"}  # what a problem's name begins with


def built() -> list[dict]:
    """Rows of the kernels in tab._C_cuda; none when it was not built."""
    found = sorted(Path(__file__).parent.glob("_C_cuda.*so"))
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
        rows = list(pool.map(lambda item: _compile(*item), work))
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
