"""The machine's ceilings, measured in the run that uses them: FLOP/s, and bytes/s of memory.

On a CPU by loops of TAB's own (csrc/cpu/core/peak.cpp), in the instruction set and on the threads
of its kernels: independent multiply-adds in registers, and reading or copying, whichever is faster,
of a buffer larger than the caches. PyTorch's matrix product is no ceiling: some ops beat it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from .. import ops  # noqa: F401  it loads the library that has tab::peak

MULTIPLY_ADDS, READ, COPY = range(3)


@dataclass(frozen=True)
class Roofline:
    flops: float  # FLOP/s
    bandwidth: float  # bytes/s, read and written counted
    by: str = "loops of multiply-adds, reads and copies"

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which no implementation can go."""
        return max(flops / self.flops, moved / self.bandwidth)

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_roofline(dtype: torch.dtype, device: str, rounds: int = 7) -> Roofline:
    """The best of several: a ceiling is what the machine can do when nothing disturbs it. The
    ceiling of half types on a CPU is float32's, in which the kernels calculate."""
    if device.startswith("cuda") or not hasattr(torch.ops.tab, "peak"):
        return _by_pytorch(dtype, device, rounds)
    x = torch.zeros(2**26)

    def rate(what: int, repeats: int) -> float:
        work = torch.ops.tab.peak(x, what, repeats)
        return work / _best(lambda: torch.ops.tab.peak(x, what, repeats), device, rounds)

    return Roofline(rate(MULTIPLY_ADDS, 2**20), max(rate(READ, 1), rate(COPY, 1)))


def _by_pytorch(dtype: torch.dtype, device: str, rounds: int) -> Roofline:
    """A large matrix product and a large copy: on a GPU, and where TAB's kernels are not built."""
    gpu = device.startswith("cuda")
    n = 8192 if gpu else 1536
    # half types are emulated in CPU products; their ceiling there is float32's
    kind = dtype if gpu else torch.float32
    a = torch.randn(n, n, device=device, dtype=kind)
    source = torch.empty(2**28 if gpu else 2**26, device=device).normal_()
    target = torch.empty_like(source)
    product = _best(lambda: a @ a, device, rounds)
    copy = _best(lambda: target.copy_(source), device, rounds)
    by = "PyTorch's matrix product and copy, which may be below what the machine can do"
    return Roofline(2 * n**3 / product, 2 * source.numel() * 4 / copy, by)


def _best(f, device: str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
