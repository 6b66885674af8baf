"""Local attention by formula (tab/ops/local.py), in PyTorch operators.

It walks over chunks of queries. Their keys lie in one contiguous band with closed-form ends (on a
grid: whole rows), so it holds CHUNK × band scores at a time and never N × N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._check import accumulate, token_major
from ._softmax import (
    alibi,
    empty_heads,
    empty_outputs,
    quiet,
    row_sums,
    shared_heads,
    softmax_backward,
    softmax_forward,
)

CHUNK = 64  # queries whose scores the reference holds at once


def in_window(i: Tensor, j: Tensor, left: int, right: int, cols: int, causal: bool) -> Tensor:
    """Whether query i sees key j (tensors that broadcast). cols 0: the tokens are a line."""
    if cols:
        down, across = j // cols - i // cols, j % cols - i % cols
        seen = (down >= -left) & (down <= right) & (across >= -left) & (across <= right)
    else:
        seen = (j - i >= -left) & (j - i <= right)
    return seen & (j <= i) if causal else seen


def tiles(
    q: Tensor, k: Tensor, left: int, right: int, cols: int, causal: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Per chunk of queries: the queries, the band of keys that they can see, who sees whom."""
    n, m, width = q.shape[-2], k.shape[-2], cols or 1  # on a line every token is its own row
    shift = m - n
    for start in range(0, max(n, 1), CHUNK):  # without tokens one empty tile
        stop = min(start + CHUNK, n)
        first = max(0, ((start + shift) // width - left) * width)
        last = stop + shift
        if not causal:
            last = min(m, ((last - 1) // width + right + 1) * width)
        last = max(first, last)  # queries before the first key
        i = torch.arange(start, stop, device=q.device)[:, None] + shift
        j = torch.arange(first, last, device=q.device)
        seen = in_window(i, j, left, right, cols, causal)  # (≤ CHUNK, band)
        yield slice(start, stop), slice(first, last), seen


def _told(key_mask, slopes, i, j, seen, kv, heads, shift):
    """What is allowed and the bias of a tile: queries i and keys j (slices), who sees whom (n, m);
    both broadcast against scores (B, H, n, m), or (B, H_kv, H/H_kv, n, m) for shared heads."""
    if key_mask is not None:
        ones = (1,) * (2 if heads == kv else 3)
        seen = seen & key_mask[:, j].unflatten(0, (-1, *ones))
    if slopes is None:
        return seen, None
    rows = torch.arange(i.start, i.stop, device=slopes.device)[:, None] + shift
    cols = torch.arange(j.start, j.stop, device=slopes.device)
    each = (heads,) if heads == kv else (kv, -1)
    return seen, alibi(slopes.view(*each, 1, 1), rows, cols)


def forward_reference(
    q, k, v, key_mask, slopes, left, right, rows, cols, causal, scale, softcap
):  # fmt: skip
    """-> o (B, H, N, Dv), lse (B, H, N) in the accumulation type."""
    acc = accumulate(q)
    if q.is_meta:  # shapes need no walk
        return empty_outputs(q, v, acc)
    dtype, place, parts = q.dtype, (k.shape[1], q.shape[1], k.shape[2] - q.shape[2]), []
    q = quiet(key_mask, q)
    q, k, v = shared_heads(k.shape[1], q.to(acc), k.to(acc), v.to(acc))
    for i, j, seen in tiles(q, k, left, right, cols, causal):
        tile = q[..., i, :], k[..., j, :], v[..., j, :]
        allowed, bias = _told(key_mask, slopes, i, j, seen, *place)
        parts.append(softmax_forward(*tile, allowed, scale, softcap, bias)[:2])
    o, lse = (torch.cat([x[which] for x in parts], dim) for which, dim in ((0, -2), (1, -1)))
    if o.dim() == 5:
        o, lse = o.flatten(1, 2), lse.flatten(1, 2)
    return token_major(o.to(dtype)), lse


def backward_reference(
    do, q, k, v, o, lse, key_mask, slopes, left, right, rows, cols, causal, scale, softcap
):  # fmt: skip
    """-> dq, dk, dv. P is recomputed tile by tile from lse; Δ = Σ do∘o."""
    if q.is_meta:
        return empty_heads(q), empty_heads(k), empty_heads(v)
    acc, dtype, shape = accumulate(q), q.dtype, q.shape
    place = k.shape[1], q.shape[1], k.shape[2] - q.shape[2]
    do, q, k, v = do.to(acc), quiet(key_mask, q).to(acc), k.to(acc), v.to(acc)
    delta = row_sums(do, o.to(acc))  # (B, H, N)
    dq, dk, dv = [], do.new_zeros(k.shape), do.new_zeros(v.shape)
    do, q, k, v, lse, delta = shared_heads(k.shape[1], do, q, k, v, lse, delta)
    for i, j, seen in tiles(q, k, left, right, cols, causal):
        tile = do[..., i, :], q[..., i, :], k[..., j, :], v[..., j, :], lse[..., i], delta[..., i]
        told = _told(key_mask, slopes, i, j, seen, *place)
        dq_tile, dk_tile, dv_tile = softmax_backward(*tile, told[0], scale, softcap, told[1])
        dq.append(dq_tile)
        dk[:, :, j] += dk_tile if dk_tile.dim() == 4 else dk_tile.sum(2)
        dv[:, :, j] += dv_tile if dv_tile.dim() == 4 else dv_tile.sum(2)
    return tuple(token_major(x.to(dtype)) for x in (torch.cat(dq, -2).view(shape), dk, dv))
