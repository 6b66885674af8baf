"""H2O: attention to a bounded cache of heavy hitters and recent tokens, chosen per head.

Zhang et al. 2023, "H2O: Heavy-Hitter Oracle", algorithm 1. The cache S holds budget = heavy +
recent slots (k_j, v_j, A_j). A token is appended with A = 0 and attends S with itself, p = softmax;
A += p; over budget, the slot of least A among those older than the last `recent` leaves for good.

Each batch entry and head keeps its own tokens. Which ones is a constant for the gradient. A
composition of PyTorch's own operators; `H2OCache.step` is the algorithm, all else is built on it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ._check import accumulate, autocast, check_key_mask, check_qkv, shapes, token_major

MODES = ("streaming", "exact")


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


def h2o_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heavy: int,
    recent: int,
    causal: bool = False,
    mode: str = "streaming",
    block: int = 64,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention through a cache of heavy + recent tokens per head (Zhang et al. 2023).

    mode "streaming", O(N·(budget + block)) memory: one pass over the tokens in blocks. The queries
    of a block attend the cache (what earlier blocks left in it) and their own block, then the cache
    takes the block in and evicts down to its budget: the last `recent` tokens, and of the others
    the `heavy` that were attended most so far. block=1 with causal=True is algorithm 1, token by
    token. `causal` decides only about the own block (all of it, or j ≤ i): blocks that come later
    are never seen, since their tokens are not there yet. With N ≤ block this is full attention.

    mode "exact", O(N²) memory: the scores of full attention choose, then the queries attend again,
    now only to the chosen. Bidirectional: one choice for all queries, A_j = Σ_i P_ij. Causal: query
    i has its own choice from the tokens j ≤ i, by A_j = Σ_{t≤i} P_tj, so nothing leaks back.

    Args:
        q, k: (B, H, N, D); v: (B, H, N, Dv). One floating dtype, one device.
        heavy, recent: slots for heavy hitters and for the latest tokens; at least one in all.
        causal: token i sees no token j > i.
        block: tokens per step of "streaming".
        scale: of the scores, D^(-1/2) by default.
        key_mask: (B, N) bool, True where a token is real; the others are never attended, credit
            nothing, and do not count as recent.

    Returns:
        o (B, H, N, Dv) in the input's dtype. A query that sees no real token gets 0.

    Raises:
        ValueError: an option out of range, or shapes, dtypes or devices that do not fit.
    """
    check_qkv("h2o_attention", q, k, v)
    check_key_mask("h2o_attention", key_mask, k)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if block < 1:
        raise ValueError(f"block={block}: a block has at least 1 token")
    cache = H2OCache(heavy=heavy, recent=recent, scale=scale)
    q, k, v = autocast(q, k, v)
    if mode == "streaming":
        outputs = []
        for start in range(0, q.shape[2], block):
            now = slice(start, start + block)
            mask = None if key_mask is None else key_mask[:, now]
            outputs.append(
                cache.step(q[:, :, now], k[:, :, now], v[:, :, now], causal=causal, key_mask=mask)
            )
        return token_major(torch.cat(outputs, 2))
    cache._append(k, v, key_mask)
    p = cache._probabilities(q.detach(), causal).detach()  # (B, H, N, N)
    if causal:
        visible = _kept_per_query(p, cache, key_mask)  # (B, H, N, N)
    else:
        cache._credit(p, key_mask)
        cache._evict()
        visible = cache.position[:, :, None] >= 0  # (B, H, 1, budget)
    if key_mask is None and not causal:
        return token_major(scaled_dot_product_attention(q, cache.k, cache.v, scale=scale))
    # Some SDPA kernels answer NaN to a row that sees nothing: let it see all, and cut it.
    blind = ~visible.any(-1, keepdim=True)
    o = scaled_dot_product_attention(q, cache.k, cache.v, attn_mask=visible | blind, scale=scale)
    return token_major(o.masked_fill(blind, 0.0))


def _kept_per_query(p: Tensor, cache: H2OCache, key_mask: Tensor | None) -> Tensor:
    """p (B, H, N, N) causal -> the (B, H, N, N) bool mask of what each query's prefix keeps."""
    n, budget = p.shape[-1], cache.heavy + cache.recent
    if key_mask is not None:
        p = p * key_mask[:, None, :, None]
    token = torch.arange(n, device=p.device)
    hidden = (token > token[:, None]) | (cache.position[:, :, None] < 0)  # (B, H, N, N)
    # Real tokens up to query i, for i itself real or not.
    seen = (cache.position >= 0).cumsum(-1)[..., None]  # (B, H, N, 1)
    priority = p.cumsum(2).masked_fill(cache.position[:, :, None] >= seen - cache.recent, torch.inf)
    priority = priority.masked_fill(hidden, -torch.inf)
    kept = priority.topk(min(budget, n), -1).indices
    return torch.zeros_like(hidden).scatter(-1, kept, True) & ~hidden
