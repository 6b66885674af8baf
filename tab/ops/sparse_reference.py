"""Block-sparse attention by formula (tab/ops/sparse.py), in PyTorch operators.

It gathers the listed blocks, one group of equally long block rows at a time: O(nnz·b²) scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, token_major
from ._softmax import (
    alibi,
    empty_heads,
    empty_outputs,
    quiet,
    row_sums,
    softmax_backward,
    softmax_forward,
)


def to_blocks(x: Tensor, b: int) -> Tensor:
    """x (B, H, N, …) -> (B, H·nb, b, …), padded with zeros."""
    n, h = x.shape[2], x.shape[1]
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, -n % b))
    return padded.reshape(x.shape[0], h * -(-n // b), b, *x.shape[3:])


def from_blocks(x: Tensor, h: int, n: int) -> Tensor:
    """The inverse of `to_blocks`."""
    return x.reshape(x.shape[0], h, -(-n // x.shape[2]) * x.shape[2], *x.shape[3:])[:, :, :n]


def groups(
    row_ptr: Tensor, col: Tensor, h: int, kv: int, n: int, m: int, b: int, causal: bool,
    key_mask: Tensor | None, slopes: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:  # fmt: skip
    """Per length of block rows that occurs: the block rows (G,), as indices into (H·nb), the blocks
    that each sees (G, L), as indices into (H_kv·⌈m/b⌉), the tokens allowed among them (G, b, L·b)
    or, masked, (B, G, b, L·b), and their bias (G, b, L·b) where there are slopes."""
    nb = row_ptr.shape[1] - 1
    start = row_ptr[:, :-1].expand(h, nb).reshape(-1)  # (H·nb,)
    length = row_ptr.diff().expand(h, nb).reshape(-1)
    offset = torch.arange(b, device=col.device)
    for size in length.unique().tolist():
        if size == 0:
            continue
        rows = (length == size).nonzero().squeeze(1)  # (G,)
        seen = col[start[rows, None] + torch.arange(size, device=col.device)].long()  # (G, L)
        i = ((rows % nb)[:, None] * b + offset)[..., None] + (m - n)  # (G, b, 1)
        j = (seen[..., None] * b + offset).flatten(1)[:, None, :]  # (G, 1, L·b)
        allowed = (j < m).expand(-1, b, -1)
        if causal:
            allowed = allowed & (j <= i)
        if key_mask is not None:
            allowed = allowed & key_mask[:, j.clamp(max=m - 1)]
        bias = None if slopes is None else alibi(slopes[rows // nb, None, None], i, j)
        yield rows, (rows // nb // (h // kv))[:, None] * -(-m // b) + seen, allowed, bias


def gather(x: Tensor, seen: Tensor) -> Tensor:
    """x (B, H_kv·nb, b, D), seen (G, L) -> (B, G, L·b, D)"""
    return x[:, seen].flatten(2, 3)


def forward_reference(
    q, k, v, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, causal, scale, softcap
):  # fmt: skip
    """-> o (B, H, N, Dv), lse (B, H, N) in the accumulation type, −∞ for an empty row."""
    acc, (_, h, n, _), (_, kv, m, _) = accumulate(q), q.shape, k.shape
    if q.is_meta:  # the pattern has no values to walk over
        return empty_outputs(q, v, acc)
    if n == 0:
        o, lse = empty_outputs(q, v, acc)  # with a graph all the same
        return o + (q.sum() + k.sum() + v.sum()), lse + q.sum()
    qb, kb, vb = (to_blocks(x.to(acc), block_size) for x in (quiet(key_mask, q), k, v))
    o = qb.new_zeros(*qb.shape[:3], v.shape[-1])
    lse = qb.new_full(qb.shape[:3], -torch.inf)
    told = h, kv, n, m, block_size, causal, key_mask, slopes
    for rows, seen, allowed, bias in groups(row_ptr, col, *told):
        keys = gather(kb, seen), gather(vb, seen)
        tile = softmax_forward(qb[:, rows], *keys, allowed, scale, softcap, bias)
        o, lse = o.index_copy(1, rows, tile[0]), lse.index_copy(1, rows, tile[1])
    o, lse = from_blocks(o, h, n).to(v.dtype), from_blocks(lse, h, n)
    return token_major(o), lse.contiguous()


def backward_reference(
    do, q, k, v, o, lse, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, causal, scale,
    softcap,
):  # fmt: skip
    """-> dq, dk, dv. P is recomputed group by group from lse; Δ = Σ do∘o."""
    if q.is_meta or q.shape[2] == 0:
        return empty_heads(q), empty_heads(k), empty_heads(v)
    acc, (_, h, n, _), (_, kv, m, _) = accumulate(q), q.shape, k.shape
    delta = row_sums(do.to(acc), o.to(acc))  # (B, H, N)
    dob, qb, kb, vb = (to_blocks(x.to(acc), block_size) for x in (do, quiet(key_mask, q), k, v))
    lb, db = to_blocks(lse, block_size), to_blocks(delta, block_size)
    dq, dk, dv = (dob.new_zeros(x.shape) for x in (qb, kb, vb))
    told, bent = (h, kv, n, m, block_size, causal, key_mask, slopes), (scale, softcap)
    for rows, seen, allowed, bias in groups(row_ptr, col, *told):
        keys = gather(kb, seen), gather(vb, seen)
        dq[:, rows], dk_seen, dv_seen = softmax_backward(
            dob[:, rows], qb[:, rows], *keys, lb[:, rows], db[:, rows], allowed, *bent, bias
        )
        dk.index_add_(1, seen.flatten(), dk_seen.unflatten(2, (-1, block_size)).flatten(1, 2))
        dv.index_add_(1, seen.flatten(), dv_seen.unflatten(2, (-1, block_size)).flatten(1, 2))
    heads = zip((dq, dk, dv), (h, kv, kv), (n, m, m), strict=True)
    return tuple(token_major(from_blocks(x, count, size).to(q.dtype)) for x, count, size in heads)
