"""Rotary positions: pair (x_2i, x_2i+1) turned by the angle position · θ^(-2i/D).

Su et al. 2021, "RoFormer", eq. 15; interleaved pairs as in DeepSeek-V2. On a grid the first half of
the pairs turns with the row, the second with the column (axial; Heo et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._check import accumulate
from ._repr import Shown


class Rope(Shown):
    """Rotates x (…, N, D) by its position, N ≤ seq_len. D is even, on a grid a multiple of 4.

    The tables are float32, or float64 after `double()`; never rounded to a half type, and made
    again wherever the module goes, from the meta device too.
    """

    stacking = True

    def __init__(
        self, dim: int, seq_len: int, *, grid: tuple[int, int] | None = None, theta: float = 1e4
    ):
        super().__init__()
        if dim % (4 if grid else 2):
            raise ValueError(
                f"rotary positions turn pairs{' per axis of the grid' if grid else ''}: the head "
                f"dimension must be a multiple of {4 if grid else 2}, got {dim}; change the width, "
                "num_heads or rope_dim, whichever it comes from"
            )
        self.pairs, self.seq_len, self.grid, self.theta = dim // 2, seq_len, grid, theta
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._fill(torch.float32, self.cos.device)

    def table(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, (N, D/2), rounded once from float64."""
        pairs = self.pairs // (2 if self.grid else 1)
        exponent = torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs
        token = torch.arange(self.seq_len, dtype=torch.float64, device="cpu")
        positions = [token // self.grid[1], token % self.grid[1]] if self.grid else [token]
        angle = torch.cat([p[:, None] * self.theta**-exponent for p in positions], -1)
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)

    def _fill(self, dtype: torch.dtype, device: torch.device) -> None:
        self.cos, self.sin = self.table(dtype, device)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        double = self.cos.dtype == torch.float64
        self._fill(torch.float64 if double else torch.float32, self.cos.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        n, acc = x.shape[-2], accumulate(x)
        if n > self.seq_len:
            raise ValueError(
                f"rotary positions were made for {self.seq_len} tokens, got {n} in x "
                f"{tuple(x.shape)}; build the layer with seq_len={n}"
            )
        if self.cos.is_meta and not x.is_meta:  # load_state_dict(assign=True): no one moved them
            self._fill(acc, x.device)
        tables = self.cos, self.sin
        if acc == torch.float64 != self.cos.dtype:
            tables = self.table(acc, x.device)
        cos, sin = (t[:n].to(acc) for t in tables)
        even, odd = x[..., 0::2].to(acc), x[..., 1::2].to(acc)  # (…, N, D/2)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(x.dtype)
