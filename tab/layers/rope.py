"""Rotary positions: pair (x_2i, x_2i+1) turned by the angle position · θ^(-2i/D).

Su et al. 2021, "RoFormer", eq. 15; interleaved pairs as in DeepSeek-V2. On a grid the first half of
the pairs turns with the row, the second with the column (axial; Heo et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    """Rotates x (…, N, D) by its position, N ≤ seq_len. D is even, on a grid a multiple of 4."""

    def __init__(
        self, dim: int, seq_len: int, *, grid: tuple[int, int] | None = None, theta: float = 1e4
    ):
        super().__init__()
        if dim % (4 if grid else 2):
            raise ValueError(
                f"rotary positions turn pairs{' per axis of the grid' if grid else ''}: the head "
                f"dimension must be a multiple of {4 if grid else 2}, got {dim}"
            )
        axes = 2 if grid else 1
        pairs = dim // 2 // axes
        frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)  # (P,)
        token = torch.arange(seq_len, dtype=torch.float64)
        positions = [token // grid[1], token % grid[1]] if grid else [token]
        angle = torch.cat([p[:, None] * frequency for p in positions], -1)  # (N, D/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-2]
        if n > len(self.cos):
            raise ValueError(
                f"rotary positions were made for {len(self.cos)} tokens, got {n} in x "
                f"{tuple(x.shape)}; build the layer with seq_len={n}"
            )
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()  # (…, N, D/2)
        cos, sin = self.cos[:n], self.sin[:n]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(x.dtype)
