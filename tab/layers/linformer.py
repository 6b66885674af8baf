"""Linformer attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._check import accumulate, real, token_major
from ..ops._sdpa import once
from ._base import HeadsAttention
from ._registry import register_attention
from ._stacking import stacks
from ._state import is_plain
from .basic import softmax_weights


@register_attention("linformer")
class LinformerAttention(HeadsAttention):
    """softmax(Q(EᵀK)ᵀ/√D)(FᵀV) with trained E, F (N_max, K) (Wang et al. 2020, eq. 7).

    k: rows that K and V are projected to; by default a quarter of max_seq_len, at least 1.
    max_seq_len: N_max, by default seq_len; fewer tokens use the first rows.
    share_kv: F = E. share_heads: one E (and F) for all heads, else one each.

    Raises ValueError: k outside of 1 … max_seq_len, max_seq_len below seq_len, or more tokens than
    that in `forward`.

    >>> layer = build_attention("linformer", 32, seq_len=64, k=8)
    >>> layer(x).shape, layer.E.shape
    (torch.Size([2, 64, 32]), torch.Size([1, 64, 8]))
    """

    title, colour = "Linformer", 4

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        k: int | None = None,
        max_seq_len: int | None = None,
        share_kv: bool = True,
        share_heads: bool = True,
        inner_dim: int | None = None,
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim)
        longest = seq_len if max_seq_len is None else max_seq_len
        if longest < seq_len:
            raise ValueError(
                f"max_seq_len={longest}, but the model has seq_len={seq_len} tokens; nearest "
                f"choice: max_seq_len={seq_len}"
            )
        k = max(1, longest // 4) if k is None else k
        if not 1 <= k <= longest:
            raise ValueError(
                f"k={k}: Linformer projects max_seq_len={longest} tokens to 1 ≤ k ≤ {longest} "
                f"rows; nearest choice: k={min(max(k, 1), longest)}"
            )
        self.k, self.max_seq_len = k, longest
        self.E = nn.Parameter(torch.empty(1 if share_heads else num_heads, longest, k))
        self.F = None if share_kv else nn.Parameter(torch.empty_like(self.E))
        for p in (self.E, self.F):
            if p is not None:  # EᵀK then has the variance of K
                nn.init.normal_(p, std=seq_len**-0.5)

    def compute(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        # A masked token is 0, and so is its share in EᵀK and FᵀV.
        q, k, v = self.compressed(x, key_mask)
        y = token_major(once(q, k, v))  # (B, H, N, D)
        return self.out(y.transpose(1, 2).flatten(2))

    def compressed(
        self, x: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q (B, H, N, D), EᵀK and FᵀV (B, H, K, D)"""
        n = x.shape[1]
        if n > self.max_seq_len:
            raise ValueError(
                f"linformer: N = {n} tokens, but E and F have rows for max_seq_len="
                f"{self.max_seq_len}; build the layer with max_seq_len={n} or more"
            )
        if not is_plain(self.qkv):  # what it has beside its weight counts too
            q, k, v = self.project(x)
            k, v = real(key_mask, k, v)
            E, F_ = self.E[:, :n], (self.E if self.F is None else self.F)[:, :n]
            return q, E.mT @ k, F_.mT @ v
        qkv = self.qkv.weight
        if self.qkv.bias is not None:  # as the weight of one more feature, 1 in a token that counts
            one = torch.ones_like(x[..., :1]) if key_mask is None else key_mask[..., None].to(x)
            x, qkv = torch.cat([x, one], -1), torch.cat([qkv, self.qkv.bias[:, None]], 1)
        return self.with_weights(x, qkv, self.E, self.F)

    def with_weights(
        self, x: Tensor, qkv: Tensor, E: Tensor, F_: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`compressed` as a function of the weights."""
        wq, wk, wv = qkv.chunk(3)  # (C, C)
        q = F.linear(x, wq).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if F_ is None:
            return q, *self._compress(x, E, wk, wv)
        return q, *self._compress(x, E, wk), *self._compress(x, F_, wv)

    def _compress(self, x: Tensor, E: Tensor, *weights: Tensor) -> list[Tensor]:
        """Eᵀ(xW), (B, H, K, D), for each W (C, C); as (Eᵀx)W where that costs less at the longest
        x: by its own length, an exported program would serve the long or the short ones alone."""
        c, (sets, n, k), m = x.shape[2], E.shape, len(weights)
        heads, E = (self.num_heads, -1), E[:, : x.shape[1]]  # (1 or H, N, K)
        if sets * n * k * c + m * k * c * c > m * (n * c * c + n * k * c):
            each = (F.linear(x, w).unflatten(-1, heads).transpose(1, 2) for w in weights)
            return [E.mT @ h for h in each]
        if sets == 1:
            short = E.mT @ x  # (B, K, C)
            return [F.linear(short, w).unflatten(-1, heads).transpose(1, 2) for w in weights]
        short = E.mT @ x[:, None]  # (B, H, K, C)
        return [short @ w.unflatten(0, heads).mT for w in weights]

    def attention_matrix(self, x: Tensor) -> Tensor:
        """|softmax(QK'ᵀ/√D) Fᵀ|, each row divided by its sum.

        o_i = Σ_j a_ij v_j holds with a = softmax(QK'ᵀ/√D) Fᵀ; these weights have signs and any
        sum, so what is shown is the share of token j in the size of row i.
        """
        q, short_k, _ = self.compressed(x)
        f = (self.E if self.F is None else self.F)[:, : x.shape[1]]  # (1 or H, N, K)
        acc = accumulate(q)
        a = softmax_weights(q.to(acc), short_k.to(acc)) @ f.to(acc).mT  # (B, H, N, N)
        return F.normalize(a.abs(), p=1, dim=-1)


@stacks(LinformerAttention)
class StackedLinformer(LinformerAttention):
    """E and F (S, 1 or H, N_max, K)"""

    def compressed(self, x: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        weights = [w for w in (self.qkv.weight, self.E, self.F) if w is not None]
        x = x.unflatten(0, (len(self.E), -1))

        def one(x: Tensor, qkv: Tensor, E: Tensor, F_: Tensor | None = None) -> tuple[Tensor, ...]:
            return self.with_weights(x, qkv, E, F_)

        return tuple(t.flatten(0, 1) for t in torch.vmap(one)(x, *weights))
