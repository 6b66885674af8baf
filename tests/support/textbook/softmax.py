"""Softmax attention under a dense mask: what local and sparse attention come to."""

import torch


def naive(mask, scale=None):
    """mask (N, N) or (H, N, N): who sees whom; a query that sees nothing gives 0."""
    empty = ~mask.any(-1, keepdim=True)

    def attention(q, k, v):
        s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        p = s.masked_fill(~mask & ~empty, -torch.inf).softmax(-1)
        return p.masked_fill(empty, 0.0) @ v

    return attention


def in_window(n, left, right, causal=False, cols=0):
    """Who sees whom, (N, N), from the coordinates of every pair of tokens."""
    tokens = [divmod(i, cols) for i in range(n)] if cols else [(i,) for i in range(n)]
    place = torch.tensor(tokens)  # (N, axes)
    step = place[None] - place[:, None]
    seen = ((step >= -left) & (step <= right)).all(-1)
    return seen.tril() if causal else seen


def blocks(pattern, causal=False):
    """The same of a BlockPattern, (H or 1, N, N)."""
    seen = pattern.to_dense()
    return seen.tril() if causal else seen


def draw(b, h, n, d, dv=None, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, n, w, generator=g, **kwargs) for w in (d, d, dv or d)]
