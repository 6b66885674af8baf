"""Which tokens H2O keeps, for a whole sequence (formula: tab/ops/h2o.py).

Queries come in blocks. chosen (B, H, T, S) int64 says what block t may attend beside its own
tokens, by token numbers, -1 where there is none. The choices need no gradient and no v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._op import Op, no_flops
from .h2o_cache import H2OCache


def choose_reference(q, k, key_mask, heavy, recent, causal, block, scale):
    """q, k (B, H, N, D) -> chosen (B, H, ⌈N/block⌉, min(heavy + recent, N)): what the cache held
    when the block came."""
    b, h, n, _ = q.shape
    blocks, width = (n + block - 1) // block, torch.sym_min(heavy + recent, n)
    if q.is_meta or blocks == 0:
        return q.new_empty(b, h, blocks, width, dtype=torch.int64)
    cache = H2OCache(heavy=heavy, recent=recent, scale=scale)
    tokens = _tokens(q)  # in the place of v
    chosen = [tokens[:, :, :0, 0]]
    for t in range(blocks - 1):
        now = slice(t * block, (t + 1) * block)
        mask = None if key_mask is None else key_mask[:, now]
        cache._append(k[:, :, now], tokens[:, :, now], mask)
        cache._credit(cache._probabilities(q[:, :, now], causal), mask)
        cache._evict()
        chosen.append(_kept(cache))
    return torch.stack([F.pad(x, (0, width - x.shape[-1]), value=-1) for x in chosen], 2)


def choose_exact_reference(q, k, key_mask, heavy, recent, causal, scale):
    """q, k (B, H, N, D) -> chosen (B, H, T, min(heavy + recent, N)) by all scores.
    T = N when causal, each query's choice from its prefix; else 1, for all queries."""
    b, h, n, _ = q.shape
    blocks, width = (n if causal else torch.sym_min(n, 1)), torch.sym_min(heavy + recent, n)
    if q.is_meta or n == 0:
        return q.new_empty(b, h, blocks, width, dtype=torch.int64)
    cache = H2OCache(heavy=heavy, recent=recent, scale=scale)
    cache._append(k, _tokens(q), key_mask)
    p = cache._probabilities(q, causal)  # (B, H, N, N)
    if causal:
        return _kept_per_query(p, cache, key_mask, width)
    cache._credit(p, key_mask)
    cache._evict()
    return _kept(cache)[:, :, None]


def _tokens(q: Tensor) -> Tensor:
    """(B, H, N, 1), the number of each."""
    return torch.arange(q.shape[2], device=q.device).expand(q.shape[:3])[..., None]


def _kept(cache: H2OCache) -> Tensor:
    _, tokens, _, position = cache._slots()
    return tokens[..., 0].masked_fill(position < 0, -1)


def _kept_per_query(p: Tensor, cache: H2OCache, key_mask: Tensor | None, width: int) -> Tensor:
    """p (B, H, N, N) causal -> what each query's prefix keeps, (B, H, N, width)."""
    if key_mask is not None:
        p = p.masked_fill(~key_mask[:, None, :, None], 0.0)
    token, position = torch.arange(p.shape[-1], device=p.device), cache._slots()[3]
    hidden = (token > token[:, None]) | (position[:, :, None] < 0)  # (B, H, N, N)
    # Real tokens up to query i, for i itself real or not.
    seen = (position >= 0).cumsum(-1)[..., None]  # (B, H, N, 1)
    last = position[:, :, None] >= seen - cache.recent
    priority = p.cumsum(2).masked_fill(last, torch.inf).masked_fill(hidden, -torch.inf)
    kept = priority.topk(width, -1).indices
    return kept.masked_fill(hidden.gather(-1, kept), -1)


def _exact_flops(q, k, *_, **__) -> int:
    """All N² scores, which this mode needs before those of the chosen."""
    b, h, n, d = q
    return 2 * b * h * n * n * d


SHAPES = """
    q k: B H N D
    key_mask: B N bool
"""
_OPTIONS = "(Tensor q, Tensor k, Tensor? key_mask, SymInt heavy, SymInt recent, bool causal, "
# Its scores are those that h2o_attend counts.
h2o_choose = Op(
    "h2o_choose",
    f"{_OPTIONS}SymInt block, float scale) -> Tensor",
    choose_reference,
    flops=no_flops,
    shapes=SHAPES,
)
h2o_choose_exact = Op(
    "h2o_choose_exact",
    f"{_OPTIONS}float scale) -> Tensor",
    choose_exact_reference,
    flops=_exact_flops,
    shapes=SHAPES,
)
