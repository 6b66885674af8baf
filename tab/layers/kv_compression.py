"""H2O attention as a layer."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from ..ops.h2o import MODES, Mode, h2o_attention
from ._base import HeadsAttention
from ._registry import register_attention


@register_attention("kv_compression")
class KVCompressionAttention(HeadsAttention):
    """Each head keeps heavy hitters and recent tokens only (H2O; Zhang et al. 2023).

    compression_ratio: budget = max(1, ⌊N·ratio⌋) tokens kept, N as given, padding included.
    heavy, recent: how many of each; half and half by default, the odd one recent. If one is given
        the other gets the rest of the budget; if both are, the ratio is not used.
    mode: "streaming", blocks of queries attend the cache and their own block, or "exact", the
        scores of full attention choose for all (see `tab.h2o_attention`).
    block: tokens per step of "streaming"; by default ⌈N/4⌉ and at most 64, so that short sequences
        (64 tokens of an image) meet the cache too: one block of N tokens would be full attention.

    Raises ValueError: a ratio outside of (0, 1], numbers that keep nothing, another mode, or a
    block below 1.

    >>> layer = build_attention("kv_compression", 32, seq_len=64, compression_ratio=0.25)
    >>> layer(x).shape, layer.split(64)
    (torch.Size([2, 64, 32]), (8, 8))
    """

    title, colour, stacking = "KV Compression", 7, True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        compression_ratio: float = 0.5,
        heavy: int | None = None,
        recent: int | None = None,
        mode: str = "streaming",
        block: int | None = None,
        rope: bool = False,
        inner_dim: int | None = None,
    ):
        super().__init__(
            dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim, rope=rope
        )
        if not 0 < compression_ratio <= 1:
            nearest = "1" if compression_ratio > 1 else f"{1 / seq_len:.3g} (one token)"
            raise ValueError(
                f"compression_ratio={compression_ratio}: the share of the tokens to keep is over "
                f"0 and at most 1; nearest choice: {nearest}"
            )
        for name, value in (("heavy", heavy), ("recent", recent)):
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: a number of tokens ≥ 0; nearest choice: 0")
        if heavy == 0 and recent == 0:
            raise ValueError("heavy=0 and recent=0 keep nothing; nearest choice: recent=1")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
        if block is not None and block < 1:
            raise ValueError(f"block={block}: a block has at least 1 token")
        self.compression_ratio, self.block = compression_ratio, block
        self.mode = cast(Mode, mode)
        self.heavy, self.recent = heavy, recent

    def split(self, n: int) -> tuple[int, int]:
        """Of N tokens, how many (heavy, recent) are kept."""
        budget = max(1, math.floor(n * self.compression_ratio + 1e-9))  # 100·0.29 is 28.99…
        heavy, recent = self.heavy, self.recent
        if heavy is None:
            heavy = budget // 2 if recent is None else max(0, budget - recent)
        if recent is None:
            recent = max(0, budget - heavy)
        return heavy, recent

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        heavy, recent = self.split(n)
        block = min(64, -(-n // 4)) if self.block is None else self.block
        return h2o_attention(
            q, k, v, heavy=heavy, recent=recent, mode=self.mode, block=block, key_mask=key_mask
        )

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        # Linear in v for a given choice: attending to the unit vectors reads the weights off.
        b, h, n, _ = q.shape
        tokens = torch.eye(n, dtype=q.dtype, device=q.device).expand(b, h, n, n)
        return self.attend(q, k, tokens, None)
