"""Block-sparse (BigBird) attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.pattern import BlockPattern
from ..ops.sparse import sparse_attention
from ._base import HeadsAttention
from ._registry import register_attention
from .local import hide_keys

PATTERNS = 8  # sequence lengths whose pattern a layer keeps


@register_attention("sparse")
class SparseAttention(HeadsAttention):
    """softmax(QKᵀ/√D) over global, window and random blocks (BigBird; Zaheer et al. 2020).

    block_size: tokens in a block. window: blocks around a block, odd. num_global: blocks at each
    end that see all and are seen by all. num_random: further blocks for each block and head, drawn
    once from `seed`. With few blocks nothing is left out: 64 tokens in blocks of 32, the published
    configuration, are two global blocks, and the layer is multi-head attention; so it is when a
    block is longer than the sequence.
    """

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        block_size: int = 32,
        window: int = 3,
        num_global: int = 1,
        num_random: int = 3,
        seed: int = 0,
        rope: bool = False,
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads, rope=rope)
        self.options = {
            "heads": num_heads, "window": window, "num_global": num_global,
            "num_random": num_random, "seed": seed,
        }  # fmt: skip
        self.block_size = block_size
        self.patterns: dict[int, BlockPattern] = {}
        self.pattern(seq_len)  # bad options are found here, not in the first step

    def pattern(self, n: int) -> BlockPattern:
        """The pattern for n tokens, made once."""
        if n not in self.patterns:
            if len(self.patterns) == PATTERNS:
                del self.patterns[next(iter(self.patterns))]
            size = min(self.block_size, n)
            self.patterns[n] = BlockPattern.bigbird(n, block_size=size, **self.options)
        return self.patterns[n]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        scale = q.shape[-1] ** -0.5
        q, k, v = hide_keys(q, k, v, key_mask)
        return sparse_attention(q, k, v, self.pattern(q.shape[2]), scale=scale)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        seen = self.pattern(q.shape[2]).to_dense().to(q.device)  # (Hp, N, N)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)
