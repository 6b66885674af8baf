"""H2O: attention to a bounded cache of heavy hitters and recent tokens, chosen per head.

Zhang et al. 2023, "H2O: Heavy-Hitter Oracle", algorithm 1. The cache S holds budget = heavy +
recent slots (k_j, v_j, A_j). A token is appended with A = 0 and attends S with itself, p = softmax;
A += p; over budget, the slot of least A among those older than the last `recent` leaves for good.

Each batch entry and head keeps its own tokens. Which ones is a constant for the gradient. A
composition of PyTorch's own operators; `H2OCache.step` is the algorithm, all else is built on it.
On a GPU one kernel makes all choices first, and the attention to them is one batched operation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ._check import autocast, check_key_mask, check_qkv, token_major
from .h2o_cache import H2OCache
from .h2o_choice import attend_chosen, h2o_choose, masked_attention

MODES = ("streaming", "exact")


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
    if mode == "streaming" and q.is_cuda:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = heavy, recent, causal, min(block, q.shape[2]), scale
        chosen = h2o_choose("auto", q.detach(), k.detach(), key_mask, *options)
        return token_major(attend_chosen(q, k, v, chosen, key_mask, *options[2:]))
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
    return token_major(masked_attention(q, cache.k, cache.v, visible, scale))


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
