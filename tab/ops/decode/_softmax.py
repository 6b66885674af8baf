"""Softmax attention of the next tokens to the keys of earlier ones, and to their own."""

from __future__ import annotations

import torch
from torch import Tensor

from .._check import accumulate, token_major
from .._sdpa import once
from .._softmax import shared_heads, softmax_forward
from ._state import by_head

CHUNK = 128  # queries whose scores are held at once


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """q (B, H, 1, D) to all of k (B, H_kv, S, D) -> (B, H, 1, Dv); hidden (S,), in operators alone,
    is added to the scores.

    On a CPU PyTorch's flash kernel gains nothing from one query, and takes up to 1.7 times as long
    as three operators, which do not do for half types: they would round the scores.
    """
    (b, h, *_), q = q.shape, by_head(q, k)
    if q.is_cpu and q.dtype == accumulate(q):
        s = (q * scale) @ k.mT
        o = (s if hidden is None else s + hidden).softmax(-1) @ v
    else:
        o = once(q, k, v, scale)
    return o.reshape(b, h, 1, v.shape[3])


def attend_last(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q (B, H, N, D) of the last N of the tokens of k (B, H_kv, S, D) -> (B, H, N, Dv): token i
    sees i − window ≤ j ≤ i, or all j ≤ i where there is none."""
    (n, s), acc, parts = (q.shape[2], k.shape[2]), accumulate(q), []
    dtype = v.dtype
    q, k, v = shared_heads(k.shape[1], q, k, v)
    for start in range(s - n, s, CHUNK):
        stop = min(start + CHUNK, s)
        first = 0 if window is None else max(0, start - window)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(first, stop, device=q.device)
        seen = j <= i if window is None else (j <= i) & (j >= i - window)
        now = slice(start - (s - n), stop - (s - n))
        keys, values = (x[..., first:stop, :].to(acc) for x in (k, v))
        parts.append(softmax_forward(q[..., now, :].to(acc), keys, values, seen, scale)[0])
    o = torch.cat(parts, -2)
    return token_major((o.flatten(1, 2) if o.dim() == 5 else o).to(dtype))
