"""Local attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.local import local_attention
from ..ops.local_reference import in_window
from ._base import HeadsAttention
from ._registry import register_attention


@register_attention("local")
class LocalAttention(HeadsAttention):
    """softmax(QKᵀ/√D) over a window of tokens (Beltagy et al. 2020).

    window_size w: the token itself and w // 2 tokens to either side.
    two_dimensional: the window is a square of cells of the grid (Ramachandran et al. 2019). Off by
    default: the tokens are a line in raster order, which is the published configuration.

    Raises ValueError: a negative window_size, or two_dimensional without a grid.

    >>> options = {"window_size": 3, "two_dimensional": True}
    >>> layer = build_attention("local", 32, seq_len=64, grid=(8, 8), **options)
    >>> (layer.attention_matrix(x)[0, 0, 0] > 0).sum()  # the corner sees 2 × 2 cells
    tensor(4)
    """

    title, colour, stacking = "Local", 6, True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        window_size: int = 16,
        two_dimensional: bool = False,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        if window_size < 0:
            raise ValueError(f"local: window_size={window_size} must be ≥ 0; nearest choice: 0")
        if two_dimensional and grid is None:
            raise ValueError(
                "local: two_dimensional=True needs tokens on a grid, and this model gives none; "
                "use two_dimensional=False"
            )
        self.reach = window_size // 2
        self.window_grid = grid if two_dimensional else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return local_attention(q, k, v, window=self.reach, grid=self.window_grid, key_mask=key_mask)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        cols = self.window_grid[1] if self.window_grid else 0
        seen = in_window(i[:, None], i, self.reach, self.reach, cols, False)  # (N, N)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)
