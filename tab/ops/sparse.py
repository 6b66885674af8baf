"""Block-sparse attention: softmax over the blocks of keys that a pattern lists for each block of
queries.

    o_i = Σ_{j∈A(i)} exp(s_ij − L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈A(i)} exp s_ij
    A(i) = {j : block ⌊j/b⌋ is listed for block ⌊i/b⌋ of this head}, causal: and j ≤ i

Zaheer et al. 2020, "Big Bird", sec. 2 and appendix D. A row that sees nothing gives 0 and passes no
gradient. The reference gathers the listed blocks, one group of equally long block rows at a time:
O(nnz·b²) scores. Read top to bottom: reference → ops → autograd → public function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import (
    Layout,
    accumulate,
    as_given,
    check_causal,
    check_qkv,
    heads_first,
    token_major,
)
from ._op import Backend, Op, choose
from ._softmax import (
    check_lse_gradient,
    empty_heads,
    empty_outputs,
    lse_as_column,
    own_heads,
    row_sums,
    score_scale,
    softmax_backward,
    softmax_forward,
)
from .pattern import BlockPattern

# --- reference ------------------------------------------------------------------------------------


def to_blocks(x: Tensor, b: int) -> Tensor:
    """x (B, H, N, …) -> (B, H·nb, b, …), padded with zeros."""
    n, h = x.shape[2], x.shape[1]
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (0, -n % b))
    return padded.reshape(x.shape[0], h * -(-n // b), b, *x.shape[3:])


def from_blocks(x: Tensor, h: int, n: int) -> Tensor:
    """The inverse of `to_blocks`."""
    return x.reshape(x.shape[0], h, -(-n // x.shape[2]) * x.shape[2], *x.shape[3:])[:, :, :n]


def groups(
    row_ptr: Tensor, col: Tensor, h: int, kv: int, n: int, b: int, causal: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per length of block rows that occurs: the block rows (G,), as indices into (H·nb), the blocks
    that each sees (G, L), as indices into (H_kv·nb), and the tokens allowed among them
    (G, b, L·b)."""
    nb = row_ptr.shape[1] - 1
    start = row_ptr[:, :-1].expand(h, nb).reshape(-1)  # (H·nb,)
    length = row_ptr.diff().expand(h, nb).reshape(-1)
    offset = torch.arange(b, device=col.device)
    for size in length.unique().tolist():
        if size == 0:
            continue
        rows = (length == size).nonzero().squeeze(1)  # (G,)
        seen = col[start[rows, None] + torch.arange(size, device=col.device)].long()  # (G, L)
        i = (rows % nb)[:, None] * b + offset  # (G, b)
        j = (seen[..., None] * b + offset).flatten(1)  # (G, L·b)
        allowed = (j < n)[:, None, :].expand(-1, b, -1)
        if causal:
            allowed = allowed & (j[:, None, :] <= i[..., None])
        yield rows, (rows // nb // (h // kv))[:, None] * nb + seen, allowed


def gather(x: Tensor, seen: Tensor) -> Tensor:
    """x (B, H_kv·nb, b, D), seen (G, L) -> (B, G, L·b, D)"""
    return x[:, seen].flatten(2, 3)


def forward_reference(q, k, v, row_ptr, col, col_ptr, row, block_size, causal, scale):
    """-> o (B, H, N, Dv), lse (B, H, N) in the accumulation type, −∞ for an empty row."""
    acc, (_, h, n, _), kv = accumulate(q), q.shape, k.shape[1]
    if q.is_meta:  # the pattern has no values to walk over
        return empty_outputs(q, v, acc)
    if n == 0:
        o, lse = empty_outputs(q, v, acc)  # with a graph all the same
        return o + (q.sum() + k.sum() + v.sum()), lse + q.sum()
    qb, kb, vb = (to_blocks(x.to(acc), block_size) for x in (q, k, v))
    o = qb.new_zeros(*qb.shape[:3], v.shape[-1])
    lse = qb.new_full(qb.shape[:3], -torch.inf)
    for rows, seen, allowed in groups(row_ptr, col, h, kv, n, block_size, causal):
        tile = softmax_forward(qb[:, rows], gather(kb, seen), gather(vb, seen), allowed, scale)
        o, lse = o.index_copy(1, rows, tile[0]), lse.index_copy(1, rows, tile[1])
    o, lse = from_blocks(o, h, n).to(v.dtype), from_blocks(lse, h, n)
    return token_major(o), lse.contiguous()


def backward_reference(
    do, q, k, v, o, lse, row_ptr, col, col_ptr, row, block_size, causal, scale
):  # fmt: skip
    """-> dq, dk, dv. P is recomputed group by group from lse; Δ = Σ do∘o."""
    if q.is_meta or q.shape[2] == 0:
        return empty_heads(q), empty_heads(k), empty_heads(v)
    acc, (_, h, n, _), kv = accumulate(q), q.shape, k.shape[1]
    delta = row_sums(do.to(acc), o.to(acc))  # (B, H, N)
    dob, qb, kb, vb = (to_blocks(x.to(acc), block_size) for x in (do, q, k, v))
    lb, db = to_blocks(lse, block_size), to_blocks(delta, block_size)
    dq, dk, dv = (dob.new_zeros(x.shape) for x in (qb, kb, vb))
    for rows, seen, allowed in groups(row_ptr, col, h, kv, n, block_size, causal):
        keys = gather(kb, seen), gather(vb, seen)
        dq[:, rows], dk_seen, dv_seen = softmax_backward(
            dob[:, rows], qb[:, rows], *keys, lb[:, rows], db[:, rows], allowed, scale
        )
        dk.index_add_(1, seen.flatten(), dk_seen.unflatten(2, (-1, block_size)).flatten(1, 2))
        dv.index_add_(1, seen.flatten(), dv_seen.unflatten(2, (-1, block_size)).flatten(1, 2))
    heads = zip((dq, dk, dv), (h, kv, kv), strict=True)
    return tuple(token_major(from_blocks(x, count, n).to(q.dtype)) for x, count in heads)


# --- ops ------------------------------------------------------------------------------------------


# row_ptr, col, col_ptr, row: the pattern and its transpose, int32, see BlockPattern; row_ptr and
# col_ptr are (Hp, nb+1) with Hp = 1 (shared by the heads) or H.
def _pairs(q, row_ptr, col, block_size) -> int:
    """Query-key pairs in the blocks of the pattern, each block counted whole."""
    b, h, *_ = q
    return b * (col[0] * h // row_ptr[0]) * block_size**2  # a pattern is per head, or shared by all


def _flops(q, k, v, row_ptr, col, col_ptr, row, block_size, *_, **__) -> int:
    """Scores and sums: 2·(D + Dv) a pair."""
    return 2 * _pairs(q, row_ptr, col, block_size) * (q[-1] + v[-1])


def _backward_flops(do, q, k, v, o, lse, row_ptr, col, col_ptr, row, block_size, *_, **__) -> int:
    """Scores, do·v, dq, dk and dv: 2·(3·D + 2·Dv) a pair."""
    return 2 * _pairs(q, row_ptr, col, block_size) * (3 * q[-1] + 2 * v[-1])


sparse_fwd = Op(
    "sparse_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor col_ptr, Tensor row, "
    "int block_size, bool causal, float scale) -> (Tensor o, Tensor lse)",
    forward_reference,
    flops=_flops,
)
sparse_bwd = Op(
    "sparse_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor row_ptr, Tensor col, "
    "Tensor col_ptr, Tensor row, int block_size, bool causal, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, row_ptr, col, col_ptr, row, o, lse, *options):
    (do, dlse), pattern = grads, (row_ptr, col, col_ptr, row)
    if do is None and dlse is None:
        return ()
    if dlse is not None:
        check_lse_gradient("sparse_bwd", backend)
        do, v, o = lse_as_column(do, dlse, v, o)
    dq, dk, dv = sparse_bwd.below(backend, do, q, k, v, o, lse, *pattern, *options)
    return dq, dk, dv if dlse is None else dv[..., :-1]


sparse_fwd.takes["cuda"] = own_heads
sparse_fwd.differentiable(_gradients, by=sparse_bwd)

# --- public ---------------------------------------------------------------------------------------


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    layout: Layout = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    layout: Layout = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    *,
    causal: bool = False,
    is_causal: bool | None = None,
    scale: float | None = None,
    layout: Layout = "bhnd",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of a pattern, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over
    the tokens j of the blocks that the block of i sees (Zaheer et al. 2020, "Big Bird").

    Args:
        q: (B, H, N, D); k: (B, H_kv, N, D); v: (B, H_kv, N, Dv). One floating dtype, one device.
            Sums run in float32. H_kv divides H: head h of q attends with head ⌊h·H_kv/H⌋ of k and v
            (grouped-query attention, Ainslie et al. 2023; multi-query with H_kv = 1), which the C++
            kernel reads in place.
        pattern: for N tokens, and for H heads or shared by all; moved to the tensors' device once.
        causal: of the blocks seen only tokens j ≤ i.
        is_causal: another name of `causal`.
        scale: of the scores, 1/√D unless given.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        return_lse: also return L_i = log Σ_j exp(s_ij), differentiable; parts of the keys merge by
            it (`tab.merge_attention`).
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, lse), lse (B, H, N) float32 (float64 for
        float64 input) in both layouts; 0 and −∞ where a token sees nothing.

    Raises:
        ValueError: shapes, dtypes, devices or the pattern do not fit; the message prints them.
        TypeError: scale is a tensor.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> pattern = tab.BlockPattern.bigbird(64, heads=4, block_size=8, num_random=1)
        >>> tab.sparse_attention(q, k, v, pattern).shape
        torch.Size([2, 4, 64, 32])
    """
    q, k, v = heads_first("sparse_attention", layout, q, k, v)
    q, k, v = check_qkv("sparse_attention", q, k, v, grouped=True)
    causal = check_causal("sparse_attention", causal, is_causal)
    if not isinstance(pattern, BlockPattern):
        raise ValueError(
            f"sparse_attention wants a BlockPattern, got {type(pattern).__name__}; make one with "
            "BlockPattern.bigbird or, from a mask of blocks, BlockPattern.from_blocks"
        )
    if pattern.n != q.shape[2] or pattern.heads not in (None, q.shape[1]):
        raise ValueError(
            f"sparse_attention got a pattern for N = {pattern.n}, H = {pattern.heads or 'any'} and "
            f"tensors of N = {q.shape[2]}, H = {q.shape[1]}; make the pattern for these"
        )
    pattern = pattern.to(q.device)
    scale = score_scale("sparse_attention", scale, q.shape[-1])
    # The kernel is faster than dense SDPA even at density 1, so "auto" never leaves it. float32,
    # one Zen 5 core, kernel and SDPA in ms, forward, then with backward:
    #   B 128 H 4 N 64 D 64, blocks of 8   5.7 and 9.0,  18.1 and 31.4
    #   B 1 H 2 N 1024 D 64, blocks of 64  2.6 and 5.6,   8.8 and 20.0
    backend = choose(backend, sparse_fwd, q, k, cuda=k.shape[1] == q.shape[1] and not return_lse)
    options = pattern.block_size, causal, scale
    o, lse = sparse_fwd.apply(backend, q, k, v, *pattern.tensors, *options)
    return (as_given(layout, o), lse) if return_lse else as_given(layout, o)
