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


def ruled(mask, *, key_mask=None, softcap=None, slopes=None, scale=None):
    """-> f(q, k, v, sinks=None) -> o and L, of all that a softmax over keys may be told. The heads
    of q share those of k. mask (N, N) or (H, N, N), key_mask (B, N), slopes (H,); where a query
    sees nothing o is 0 and L is 0 too, to be compared, unless there is a sink."""

    def attention(q, k, v, sinks=None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            s = softcap * (s / softcap).tanh()
        i = torch.arange(s.shape[-1])
        if slopes is not None:
            s = s - slopes.to(s)[:, None, None] * (i[:, None] - i).abs()
        seen = mask if key_mask is None else mask & key_mask[:, None, None]
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(s)[:, None, None].expand(*s.shape[:3], 1)], -1)
        empty = s.isneginf().all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        p = s.softmax(-1).masked_fill(empty, 0.0)
        return p[..., : len(i)] @ v, s.logsumexp(-1).masked_fill(empty[..., 0], 0.0)

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
