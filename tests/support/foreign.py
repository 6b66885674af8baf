"""The CPU kernels on another kind of CPU, under an emulator: `make aarch64`.

Cross-compiled as they stand, and linked with foreign.cpp in PyTorch's place. The ops here hand
their C++ calls over to that program, and so the cases of sanitized.py run on it: all ops forward
and backward, ragged shapes, four memory layouts, each dtype, memory that starts as NaN, against the
references in float64.

Not collected by pytest; it runs alone:  python tests/support/foreign.py [OP ...]
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from paths import ROOT, SUPPORT
from sanitized import CASES, cases, check
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from tab.ops import OPS

COMPILER = os.environ.get("CROSS_CXX", "aarch64-linux-gnu-g++")
EMULATOR = os.environ.get("EMULATOR", "qemu-aarch64")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as setup.py
DTYPES = (
    torch.bool,
    torch.int32,
    torch.int64,
    torch.half,
    torch.bfloat16,
    torch.float,
    torch.double,
)


def build(folder: Path) -> Path:
    """One program; -O2 compiles in half the time of -O3, to the same vectors."""
    flags = ["-O2", "-std=c++20", "-Wall", "-fvisibility=hidden", TORCH_TARGET]
    flags += [word for path in include_paths() for word in ("-isystem", path)]
    sources = [*sorted((ROOT / "csrc/cpu").rglob("*.cpp")), SUPPORT / "foreign.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compiler = ["ccache", COMPILER] if shutil.which("ccache") else [COMPILER]
    for source, made in zip(sources, objects, strict=True):
        subprocess.run([*compiler, *flags, "-c", source, "-o", made], check=True)
    program = folder / "kernels"
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", program], check=True)
    return program


class Server:
    """The program under its emulator; `call` as foreign.cpp describes it."""

    def __init__(self, *command: str | Path):
        listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True)
        self.names = listed.stdout.split()
        self.calls = 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def kernel(self, name: str) -> Callable:
        schema = OPS[name].overload._schema
        kinds = [str(x.type) for x in schema.arguments]
        outputs = len(schema.returns)

        def run(*args):
            self.calls += 1
            values = b"".join(map(argument, kinds, args))
            word = name.encode()
            self.process.stdin.write(
                struct.pack("q", len(word)) + word + struct.pack("2q", outputs, len(kinds)) + values
            )
            self.process.stdin.flush()
            if (count := self.number()) < 0:
                raise RuntimeError(self.read(self.number()).decode())
            results = tuple(self.tensor() for _ in range(count))
            return results[0] if outputs == 1 else results

        return run

    def read(self, count: int) -> bytes:
        found = self.process.stdout.read(count)
        if len(found) < count:
            raise RuntimeError(f"the program ended with {self.process.wait()}")
        return found

    def number(self) -> int:
        return struct.unpack("q", self.read(8))[0]

    def tensor(self) -> Tensor:
        dtype, dims = DTYPES[self.number()], self.number()
        sizes = [self.number() for _ in range(dims)]
        strides = [self.number() for _ in range(dims)]
        data = bytearray(self.read(self.number()))
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.as_strided(sizes, strides)


def argument(kind: str, x) -> bytes:
    if x is None:
        return b"n"
    if isinstance(x, Tensor):
        return (b"o" if kind.startswith("Optional") else b"t") + packed(x)
    if kind == "float":
        return b"f" + struct.pack("d", x)
    return {"int": b"i", "bool": b"b"}[kind] + struct.pack("q", x)


def packed(x: Tensor) -> bytes:
    """With its strides: gaps and repetitions reach the kernel."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    flat = x.detach().as_strided([span if x.numel() else 0], [1])
    data = flat.contiguous().view(torch.uint8).numpy().tobytes()
    head = (DTYPES.index(x.dtype), x.dim(), *x.shape, *x.stride(), len(data))
    return struct.pack(f"{len(head)}q", *head) + data


def fused(program: Path) -> int:
    """Multiply-adds of four floats in registers that the program holds."""
    tool = COMPILER.replace("g++", "objdump")
    said = subprocess.run([tool, "-d", program], check=True, capture_output=True, text=True).stdout
    return len(re.findall(r"\bfmla\s+v\d+\.4s", said))


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        program = build(Path(temporary))
        found = fused(program)
        if not found:
            raise SystemExit("the kernels hold no multiply-add of four floats")
        print(f"built in {time.perf_counter() - start:.0f} s; {found} multiply-adds of four floats")
        server = Server(EMULATOR, program)
        wanted = {name for name, op in OPS.items() if op.own and op.why_not("cpp") is None}
        if missing := wanted - set(server.names):
            raise SystemExit(f"not in the program: {', '.join(sorted(missing))}")
        for name in set(server.names) & set(OPS):
            OPS[name].call = server.kernel(name)
            OPS[name].reasons["cpp"] = None
        count = 0
        for name in sys.argv[1:] or CASES:
            before = time.perf_counter()
            for case in cases():
                check(name, *case)
                count += 1
            print(f"  {name}: {time.perf_counter() - before:.0f} s", flush=True)
    if not server.calls >= count:
        raise SystemExit(f"{count} cases made {server.calls} calls of the program")
    took = time.perf_counter() - start
    print(f"{COMPILER}: {count} cases right, by {server.calls} calls of its kernels, {took:.0f} s")


if __name__ == "__main__":
    main()
