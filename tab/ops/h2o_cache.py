"""The cache of H2O, and its policy (Zhang et al. 2023, algorithm 1; formula: tab/ops/h2o.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import accumulate, autocast, check_key_mask, check_qkv, shapes, token_major


class H2OCache:
    """The slots that survived, S ≤ heavy + recent of them, the same number for every head.

    k (B, H, S, D); v (B, H, S, Dv); score A (B, H, S) float32, the attention each got so far;
    position (B, H, S) int64, counted in real tokens, -1 for a masked one (it is never attended and
    leaves first). All None before the first token.
    """

    def __init__(self, *, heavy: int, recent: int, scale: float | None = None):
        if heavy < 0 or recent < 0 or heavy + recent < 1:
            raise ValueError(
                f"H2O wants heavy ≥ 0, recent ≥ 0 and at least one slot in all, got heavy={heavy}, "
                f"recent={recent}; the smallest cache is heavy=0, recent=1"
            )
        self.heavy, self.recent, self.scale = heavy, recent, scale
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.score: Tensor | None = None
        self.position: Tensor | None = None
        self.seen: Tensor | int = 0  # real tokens so far; (B, 1, 1) once a mask was given

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """One decode step: append, attend, credit, evict (Zhang 2023, algorithm 1).

        q, k (B, H, T, D) and v (B, H, T, Dv) of the T next tokens -> o (B, H, T, Dv). With T > 1
        the block attends the cache and itself (causally, or all of itself with causal=False) and
        evicts once, at its end. key_mask (B, T) bool, True where a token is real.
        """
        check_qkv("H2OCache.step", q, k, v)
        check_key_mask("H2OCache.step", key_mask, k)
        if self.k is not None and (*self.k.shape[:2], self.k.shape[3], self.v.shape[3]) != (
            *k.shape[:2],
            k.shape[3],
            v.shape[3],
        ):
            raise ValueError(
                "H2OCache.step wants the batch, heads and widths it holds, got "
                f"{shapes(cache_k=self.k, cache_v=self.v, k=k, v=v)}"
            )
        q, k, v = autocast(q, k, v)
        self._append(k, v, key_mask)
        p = self._probabilities(q, causal)  # (B, H, T, S)
        o = p.to(v.dtype) @ self.v
        self._credit(p, key_mask)
        self._evict()
        return token_major(o)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """A whole prompt: full causal attention, A_j = Σ_i P_ij, then one eviction; O(N²) memory.

        Shapes as in `step`. A long prompt in blocks, by `step`, takes O(N·(budget + T)) instead.
        """
        if self.k is not None:
            raise ValueError(
                "H2OCache.prefill wants an empty cache; use step to go on, or a new one"
            )
        return self.step(q, k, v, key_mask=key_mask)

    def _append(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        b, h, t, _ = k.shape
        if key_mask is None:
            position = self.seen + torch.arange(t, device=k.device)
            self.seen = self.seen + t
        else:
            position = self.seen + key_mask[:, None].cumsum(-1) - 1  # (B, 1, T)
            position = position.masked_fill(~key_mask[:, None], -1)
            self.seen = self.seen + key_mask[:, None].sum(-1, keepdim=True)
        position = position.expand(b, h, t)
        score = torch.zeros(b, h, t, dtype=accumulate(k), device=k.device)
        if self.k is None:
            self.k, self.v, self.score, self.position = k, v, score, position
            return
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.score = torch.cat([self.score, score], 2)
        self.position = torch.cat([self.position, position], 2)

    def _probabilities(self, q: Tensor, causal: bool) -> Tensor:
        """softmax over the slots, in float32; a query that sees nothing gets zeros."""
        t, slots = q.shape[2], self.k.shape[2]
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (q @ self.k.mT).to(self.score.dtype) * scale  # (B, H, T, S)
        visible = self.position[:, :, None] >= 0  # (B, H, 1, S)
        if causal:
            slot = torch.arange(slots, device=q.device)
            visible = visible & (slot <= slot[slots - t :, None])  # own block: not the later ones
        # Not -inf: the softmax of a row of nothing but -inf is NaN, and so is its gradient.
        p = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return p * visible

    def _credit(self, p: Tensor, key_mask: Tensor | None) -> None:
        p = p.detach()
        if key_mask is not None:  # what padding attends to counts for nothing
            p = p * key_mask[:, None, :, None]
        self.score = self.score + p.sum(2)

    def _evict(self) -> None:
        budget = self.heavy + self.recent
        if self.k.shape[2] <= budget:
            return
        priority = self.score.masked_fill(self.position >= self.seen - self.recent, torch.inf)
        priority = priority.masked_fill(self.position < 0, -torch.inf)
        kept = priority.topk(budget, -1).indices  # (B, H, budget)
        self.k = self.k.gather(2, kept[..., None].expand(-1, -1, -1, self.k.shape[3]))
        self.v = self.v.gather(2, kept[..., None].expand(-1, -1, -1, self.v.shape[3]))
        self.score, self.position = self.score.gather(2, kept), self.position.gather(2, kept)
