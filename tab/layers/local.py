"""Local attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.local import in_window, local_attention
from ._base import HeadsAttention
from ._registry import register_attention

HIDDEN = -3e4  # in the scores: exp of it is 0 in every type, and float16 can hold it


def hide_keys(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Lets a kernel without a key mask obey one: q, k, v (B, H, N, D) with an eighth-aligned tail.

    One more dimension is 1 in q and very negative in the k of a hidden token, whose weight becomes
    exactly 0; its v is 0 too, so that a query which sees hidden tokens only gives 0.
    """
    if key_mask is None:
        return q, k, v
    real = key_mask[:, None, :, None]  # (B, 1, N, 1)
    q_tail = q.new_zeros(*q.shape[:3], 8)
    q_tail[..., 0] = q.shape[-1] ** 0.5  # undoes the scale
    k_tail = torch.zeros_like(q_tail)
    k_tail[..., :1] = torch.where(real, 0.0, HIDDEN)
    return torch.cat([q, q_tail], -1), torch.cat([k, k_tail], -1), v.where(real, 0.0)


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
        scale = q.shape[-1] ** -0.5
        q, k, v = hide_keys(q, k, v, key_mask)
        return local_attention(q, k, v, window=self.reach, grid=self.window_grid, scale=scale)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        cols = self.window_grid[1] if self.window_grid else 0
        seen = in_window(i[:, None], i, self.reach, self.reach, cols, False)  # (N, N)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)
