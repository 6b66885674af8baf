"""What is measured: an op at a size, in a dtype, on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SIZES: dict[str, dict[str, int]] = {
    "cifar": {"B": 512, "H": 4, "N": 64, "D": 64},
    "vision": {"B": 32, "H": 8, "N": 1024, "D": 64},
    "long": {"B": 1, "H": 8, "N": 8192, "D": 64},
    "window": {"B": 4, "H": 8, "N": 2048, "D": 64},
    "bigbird": {"B": 1, "H": 8, "N": 4096, "D": 64},
    "decode": {"B": 16, "H": 8, "N": 4096, "D": 64},  # one query after N tokens
    "tiny": {"B": 2, "H": 2, "N": 65, "D": 16},
    # for time and peak memory against N
    **{f"n{n}": {"B": 1, "H": 4, "N": n, "D": 64} for n in (2**i for i in range(6, 17))},
}


@dataclass(frozen=True)
class Case:
    """One op at one size. The name, "linear/vision/causal/float32", identifies it across runs."""

    op: str
    size: str
    causal: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.op}/{self.size}/{kind}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, N, D"""
        size = SIZES[self.size]
        return size["B"], size["H"], size["N"], size["D"]

    @property
    def decode(self) -> bool:
        """One query for each sequence, after N tokens that it attends to."""
        return self.size == "decode"

    def with_dtype(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)
