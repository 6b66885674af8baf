"""The machine's ceilings, measured in the run that uses them: matrix FLOP/s and copy bytes/s."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Roofline:
    flops: float  # FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of a large copy, read and written counted

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which no implementation can go."""
        return max(flops / self.flops, moved / self.bandwidth)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_roofline(dtype: torch.dtype, device: str, rounds: int = 7) -> Roofline:
    """The best of several: a ceiling is what the machine can do when nothing disturbs it."""
    gpu = device.startswith("cuda")
    n = 8192 if gpu else 1536
    # half types are emulated in CPU products; their ceiling there is float32's
    kind = dtype if gpu else torch.float32
    a = torch.randn(n, n, device=device, dtype=kind)
    source = torch.empty(2**28 if gpu else 2**26, device=device).normal_()
    target = torch.empty_like(source)
    product = _best(lambda: a @ a, device, rounds)
    copy = _best(lambda: target.copy_(source), device, rounds)
    return Roofline(2 * n**3 / product, 2 * source.numel() * 4 / copy)


def _best(f, device: str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        f()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
