"""Runs the PTX that Triton compiles, on a CPU (machine.cpp): where a launcher would start a kernel
on a GPU, its PTX is read and executed instead.

    with executed(80) as seen:
        o, s, z = linear.forward(q, k, v, …)  # on CPU tensors, results in place
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from paths import ROOT
from ptx.program import Program
from torch import Tensor

from tab.doctor.kernel_compile import code_of
from tab.doctor.kernel_launches import Launch
from tab.kernels._launch import recording

HERE = Path(__file__).parent
KEPT = ROOT / "build" / "ptx"
GAP = 1 << 36  # bytes between two tensors: no stride leads from one to the next


class Fault(Exception):
    """What a kernel did that it may not do."""


class Instruction(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("guard", ctypes.c_uint32),
        ("negated", ctypes.c_int32),
        ("operands", ctypes.c_uint32),
        ("run", ctypes.c_void_p),
        ("text", ctypes.c_char_p),
    ]


class Code(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.POINTER(Instruction)),
        ("count", ctypes.c_uint32),
        ("operands", ctypes.POINTER(ctypes.c_uint32)),
        ("registers", ctypes.c_char_p),
        ("size", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("block", ctypes.c_uint32 * 3),
        ("grid", ctypes.c_uint32 * 3),
    ]


class Region(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("data", ctypes.c_void_p)]


@functools.cache
def library() -> ctypes.CDLL:
    """machine.cpp, compiled once for these sources."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    flags = ["-std=c++20", "-O2", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC"]
    flags += ["-Wall", "-Wextra", "-Werror"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted((*HERE.glob("*.h"), *HERE.glob("*.cpp"))):
        digest.update(file.read_bytes())
    path = KEPT / f"machine-{digest.hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run([compiler, *flags, HERE / "machine.cpp", "-o", part], check=True)
            part.replace(path)
    lib = ctypes.CDLL(str(path))
    lib.ptx_sizes.restype, lib.ptx_sizes.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    lib.ptx_handler.restype, lib.ptx_handler.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    return lib


@functools.cache
def sizes(name: str) -> str | None:
    said = library().ptx_sizes(name.encode())
    return None if said is None else said.decode()


@functools.cache
def handler(name: str) -> int | None:
    return library().ptx_handler(name.encode()) if name else None


@functools.lru_cache(64)
def program(ptx: str) -> Program:
    return Program(ptx, sizes)


# --- running --------------------------------------------------------------------------------------


def regions(tensors: Sequence[Tensor]) -> tuple[list[Region], Callable[[Tensor], int]]:
    """The memory of tensors, far apart: what of each storage they reach; where a tensor lies."""
    reach: dict[int, tuple[int, int]] = {}
    for x in tensors:
        first = x.data_ptr()
        last = first + x.element_size() * (
            1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        )
        key = x.untyped_storage().data_ptr()
        low, high = reach.get(key, (first, last))
        if x.numel():
            reach[key] = min(low, first), max(high, last)
    found, shift = [], {}
    for i, (key, (low, high)) in enumerate(reach.items(), 1):
        base = i * GAP + low % 256  # aligned as it is
        found.append(Region(base, high - low, low))
        shift[key] = base - low
    return found, lambda x: x.data_ptr() + shift.get(x.untyped_storage().data_ptr(), GAP)


def run(ptx: str, grid: tuple[int, ...], args: Sequence, shared: int, reverse: bool = False) -> int:
    """Executes a kernel on CPU tensors. args: those that are not compiled in. -> instructions of
    the warp that ran most of them."""
    read = program(ptx)
    memory, where = regions([x for x in args if isinstance(x, Tensor)])
    image = bytearray(read.image)
    values = [*args, 0, 0]  # Triton's scratch memory, of which no kernel has any
    assert len(values) == len(read.parameters), "the kernel takes other arguments"
    for (name, size), x in zip(read.parameters, values, strict=True):
        if isinstance(x, Tensor):
            x = where(x)
        raw = (
            struct.pack("<f", x)
            if isinstance(x, float)
            else (x % (1 << 8 * size)).to_bytes(size, "little")
        )
        at = read.places[name]
        image[at : at + 32 * size] = raw * 32
    code = (Instruction * len(read.code))(
        *(
            (kind, guard, no, to, handler(name), text.encode())
            for kind, guard, no, to, name, text in read.code
        )
    )
    pool = (ctypes.c_uint32 * max(1, len(read.pool)))(*read.pool)
    uint3 = ctypes.c_uint32 * 3
    whole = Code(
        code, len(code), pool, bytes(image), len(image), read.thread,
        uint3(*read.special[:3]), uint3(*read.special[3:]),
    )  # fmt: skip
    said, steps = ctypes.create_string_buffer(1024), ctypes.c_uint64()
    library().ptx_run(
        ctypes.byref(whole), uint3(*grid, *(1,) * (3 - len(grid))), read.threads // 32, shared,
        (Region * max(1, len(memory)))(*memory), len(memory), int(reverse), ctypes.byref(steps),
        said, len(said),
    )  # fmt: skip
    if said.value:
        raise Fault(said.value.decode(errors="replace"))
    return steps.value


@contextlib.contextmanager
def executed(
    arch: int, reverse: bool = False, change: Callable[[str], str] = lambda ptx: ptx
) -> Iterator[list[Launch]]:
    """Within the block launchers run on the CPU what they would launch on a GPU of this
    architecture; -> the launches. reverse: the last warp and the last block first. change: of the
    PTX, before it runs."""
    seen: list[Launch] = []

    def execute(kernel, grid, *args, **options):
        launch = Launch(kernel, args, options)
        seen.append(launch)
        code = code_of(launch, arch)
        given = [x for x, kind in zip(args, launch.types, strict=True) if kind != "constexpr"]
        try:
            run(change(code.asm["ptx"]), grid, given, code.metadata.shared, reverse)
        except Fault as fault:
            raise Fault(f"{kernel.__name__}, {fault}") from None

    with recording(execute, arch):
        yield seen
