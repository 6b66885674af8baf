"""Softmax attention under a dense mask: what local and sparse attention come to."""

import torch


def naive(mask, scale=None):
    """mask (N, N_k) or (H, N, N_k): who sees whom; a query that sees nothing gives 0."""
    empty = ~mask.any(-1, keepdim=True)

    def attention(q, k, v):
        s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        p = s.masked_fill(~mask & ~empty, -torch.inf).softmax(-1)
        return p.masked_fill(empty, 0.0) @ v

    return attention


def ruled(mask, *, key_mask=None, softcap=None, slopes=None, scale=None):
    """-> f(q, k, v, sinks=None) -> o and L, of all that a softmax over keys may be told. The heads
    of q share those of k. mask (N, N_k) or (H, N, N_k), key_mask (B, N_k), slopes (H,); the last
    query stands at the last key; where a query sees nothing o is 0 and L is 0 too, to be compared,
    unless there is a sink."""

    def attention(q, k, v, sinks=None):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        s = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            s = softcap * (s / softcap).tanh()
        j = torch.arange(s.shape[-1])
        i = torch.arange(s.shape[-2]) + len(j) - s.shape[-2]
        if slopes is not None:
            s = s - slopes.to(s)[:, None, None] * (i[:, None] - j).abs()
        seen = mask if key_mask is None else mask & key_mask[:, None, None]
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(s)[:, None, None].expand(*s.shape[:3], 1)], -1)
        empty = s.isneginf().all(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        p = s.softmax(-1).masked_fill(empty, 0.0)
        return p[..., : len(j)] @ v, s.logsumexp(-1).masked_fill(empty[..., 0], 0.0)

    return attention


def in_window(n, left, right, causal=False, cols=0, keys=None):
    """Who sees whom, (N, N_k), from the coordinates of every pair of tokens."""
    keys = n if keys is None else keys
    tokens = [divmod(i, cols) if cols else (i,) for i in range(keys - max(n, keys), keys)]
    place = torch.tensor(tokens)  # (max(N, N_k), axes)
    step = place[None, len(place) - keys :] - place[len(place) - n :, None]
    seen = ((step >= -left) & (step <= right)).all(-1)
    return seen.tril(keys - n) if causal else seen


def blocks(pattern, causal=False):
    """The same of a BlockPattern, (H or 1, N, N_k)."""
    seen = pattern.to_dense()
    return seen.tril(pattern.n_keys - pattern.n) if causal else seen


def draw(b, h, n, d, dv=None, seed=0, keys=None, kv=None, **kwargs):
    """q, k and v, of `keys` tokens and kv heads if given"""
    g = torch.Generator().manual_seed(seed)
    few = b, kv or h, n if keys is None else keys
    shapes = (b, h, n, d), (*few, d), (*few, dv or d)
    return [torch.randn(s, generator=g, **kwargs) for s in shapes]
