"""Block-sparse attention: softmax over the blocks of keys that a pattern lists for each block of
queries.

    o_i = Σ_{j∈A(i)} exp(s_ij − L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈A(i)} exp s_ij
    A(i) = {j : block ⌊j/b⌋ is listed for block ⌊i/b⌋ of this head}, causal: and j ≤ p_i
    p_i = i + N_k − N_q: the queries are the last of the keys

Zaheer et al. 2020, "Big Bird", sec. 2 and appendix D. A row that sees nothing gives 0 and passes no
gradient. Read top to bottom: ops → autograd → public function. The reference is in
sparse_reference.py.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ._check import Layout, check_key_mask, check_qkv
from ._op import Backend, Op, choose
from ._options import boolean, check_causal
from ._packed import pack, pack_rows, unpack
from ._scores import check_scores
from ._sinks_op import attend, with_sinks
from ._softmax import check_lse_gradient, lse_as_column, plain_softmax, score_scale
from .pattern import BlockPattern
from .sparse_packed import PatternOf, check_pattern, packed, packed_attention
from .sparse_reference import backward_reference, forward_reference

# --- ops ------------------------------------------------------------------------------------------


# row_ptr, col, col_ptr, row: the pattern and its transpose, int32, see BlockPattern; row_ptr is
# (Hp, ⌈N_q/b⌉+1), col_ptr (Hp, ⌈N_k/b⌉+1), Hp = 1 (shared by the heads) or H. slopes and softcap
# as in local.py.
def _pairs(q, row_ptr, col, block_size) -> int:
    """Query-key pairs in the blocks of the pattern, each block counted whole."""
    b, h, *_ = q
    return b * (col[0] * h // row_ptr[0]) * block_size**2  # a pattern is per head, or shared by all


def _flops(q, k, v, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, *_, **__) -> int:
    """Scores and sums: 2·(D + Dv) a pair."""
    return 2 * _pairs(q, row_ptr, col, block_size) * (q[-1] + v[-1])


def _backward_flops(
    do, q, k, v, o, lse, row_ptr, col, col_ptr, row, key_mask, slopes, block_size, *_, **__
) -> int:  # fmt: skip
    """Scores, do·v, dq, dk and dv: 2·(3·D + 2·Dv) a pair."""
    return 2 * _pairs(q, row_ptr, col, block_size) * (3 * q[-1] + 2 * v[-1])


# row_ptr and col list the blocks of keys of each block of queries, col_ptr and row the reverse. The
# entries are values, which lie on the device: who makes a BlockPattern checks them.
SHAPES = """
    q: B H N D
    k: B K M D
    v: B K M E
    o do: B H N E
    lse: B H N
    key_mask: B M bool
    slopes: H
    row_ptr: P I
    col_ptr: P J
    col row: L
    where: K and H % K == 0
    where: P in (1, H) and block_size > 0
    where: (I - 2) * block_size < N <= (I - 1) * block_size
    where: (J - 2) * block_size < M <= (J - 1) * block_size
"""
sparse_fwd = Op(
    "sparse_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor col_ptr, Tensor row, "
    "Tensor? key_mask, Tensor? slopes, int block_size, bool causal, float scale, float softcap) "
    "-> (Tensor o, Tensor lse)",
    forward_reference,
    flops=_flops,
    shapes=SHAPES,
)
sparse_bwd = Op(
    "sparse_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor row_ptr, Tensor col, "
    "Tensor col_ptr, Tensor row, Tensor? key_mask, Tensor? slopes, int block_size, bool causal, "
    "float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
    shapes=SHAPES,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, *saved):
    (do, dlse), (*rules, o, lse), options = grads, saved[:8], saved[8:]
    if do is None and dlse is None:
        return ()
    if dlse is not None:
        check_lse_gradient("sparse_bwd", backend)
        do, v, o = lse_as_column(do, dlse, v, o)
    dq, dk, dv = sparse_bwd.below(backend, do, q, k, v, o, lse, *rules, *options)
    return dq, dk, dv if dlse is None else dv[..., :-1]


sparse_fwd.takes["cuda"] = lambda q, k, v=None, *x: plain_softmax(q, k, v, *x[4:])
sparse_fwd.differentiable(_gradients, by=sparse_bwd)
with_sinks(sparse_fwd)
sparse_packed = packed(sparse_fwd, sparse_bwd, _gradients)

# --- public ---------------------------------------------------------------------------------------


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | PatternOf,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | PatternOf,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | PatternOf,
    *,
    causal: bool = False,
    is_causal: bool | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of a pattern, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over
    the tokens j of the blocks that the block of i sees (Zaheer et al. 2020, "Big Bird").

    Args:
        q: (B, H, N, D); k: (B, H_kv, N_k, D); v: (B, H_kv, N_k, Dv). One floating dtype, one
            device. Sums run in float32. With more or fewer keys than queries (cross-attention, or
            the last tokens of a sequence) the last query stands at the last key, p_i = i + N_k − N,
            as flash-attention aligns them. H_kv divides H: head h of q attends with head
            ⌊h·H_kv/H⌋ of k and v (grouped-query attention, Ainslie et al. 2023; multi-query with
            H_kv = 1), which kernels read in place.
        pattern: for N queries and N_k keys, and for H heads or shared by all; moved to the tensors'
            device once. For other keys it is made by `BlockPattern.from_blocks(…, n_keys=N_k)`, for
            the last queries of a sequence by `pattern.tail(N)`. With cu_seqlens or nested tensors a
            function of a length, which is called once for each that occurs: cache it.
        causal: of the blocks seen only tokens j ≤ p_i.
        is_causal: another name of `causal`.
        scale: of the scores, 1/√D unless given.
        key_mask: (B, N_k) bool, True where a token is real; what the others hold, NaN too, reaches
            no real token, forward or backward. With N ≠ N_k it is of keys alone. A query that sees
            no key gives 0.
        sinks: (H,), a logit for each head that joins the sum of every softmax without a value: the
            weights of a row sum to less than 1 (`tab.merge_sinks`). Learned where it requires grad.
        softcap: c > 0 bends the scores to c·tanh(s/c) (Gemma 2 2024, sec. 2), before alibi.
        alibi: (H,), slopes m: m·|p_i − j| is subtracted from the scores (Press et al. 2021, "Train
            short, test long"); without gradient.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            The blocks of each begin at its own first token. A sequence may be empty. On a GPU
            reading the ends waits; torch.compile breaks its graph here, torch.export refuses it.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        return_lse: also return L_i = log Σ_j exp(s_ij), sinks included, differentiable; parts of
            the keys merge by it (`tab.merge_attention`).
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, lse), lse (B, H, N) float32 (float64 for
        float64 input) in both layouts; where a token sees nothing 0 and −∞, or the sink.

    Raises:
        ValueError: shapes, dtypes, devices or the pattern do not fit; the message prints them.
        TypeError: scale or softcap is a tensor.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> pattern = tab.BlockPattern.bigbird(64, heads=4, block_size=8, num_random=1)
        >>> tab.sparse_attention(q, k, v, pattern).shape
        torch.Size([2, 4, 64, 32])

    Sequences of 24 and of 40 tokens, without padding.
        >>> ends = torch.tensor([0, 24, 64])
        >>> near = lambda n: tab.BlockPattern.sliding_window(n, window=2, block_size=8)
        >>> q, k, v = torch.randn(3, 1, 4, 64, 32)
        >>> tab.sparse_attention(q, k, v, near, causal=True, cu_seqlens=ends).shape
        torch.Size([1, 4, 64, 32])
    """
    (q, k, v), packing = unpack("sparse_attention", layout, cu_seqlens, q=q, k=k, v=v)
    q, k, v = check_qkv("sparse_attention", q, k, v, grouped=True, cross=True, layout=layout)
    causal = check_causal("sparse_attention", causal, is_causal)
    boolean("sparse_attention", "return_lse", return_lse)
    scale = score_scale("sparse_attention", scale, q.shape[-1])
    check_key_mask("sparse_attention", key_mask, k)
    cap, slopes = check_scores("sparse_attention", q, sinks, softcap, alibi)
    x = q, k, v, key_mask, slopes, sinks, causal, scale, cap, return_lse, backend
    if packing is None:
        o, lse = _attend(pattern, *x)
    elif callable(pattern):
        o, lse = packed_attention(sparse_packed, pattern, packing.cu_seqlens, *x)
    else:
        raise ValueError(
            "sparse_attention wants, with cu_seqlens or nested tensors, a function of a sequence's "
            f"length that gives its BlockPattern, got {pattern!r}; for example functools.cache("
            "lambda n: BlockPattern.sliding_window(n, window=3))"
        )
    o = pack(layout, o, packing)
    return (o, pack_rows(lse, packing)) if return_lse else o


def _attend(pattern, q, k, v, key_mask, slopes, sinks, causal, scale, cap, lse, backend):
    """-> o and lse of dense q, k and v; the pattern is checked here. lse: whether it is of use."""
    if not isinstance(pattern, BlockPattern):
        raise ValueError(
            f"sparse_attention wants a BlockPattern, got {type(pattern).__name__}; make one with "
            "BlockPattern.bigbird or, from a mask of blocks, BlockPattern.from_blocks"
        )
    check_pattern(pattern, q.shape[2], k.shape[2], q.shape[1])
    # The kernel is faster than dense SDPA even at density 1, so "auto" never leaves it. float32,
    # one Zen 5 core, kernel and SDPA in ms, forward, then with backward:
    #   B 128 H 4 N 64 D 64, blocks of 8   5.7 and 9.0,  18.1 and 31.4
    #   B 1 H 2 N 1024 D 64, blocks of 64  2.6 and 5.6,   8.8 and 20.0
    rules = key_mask, slopes, pattern.block_size, causal, scale, cap
    x = q, k, v, *pattern.to(q.device).tensors, *rules
    few = q.is_cuda and plain_softmax(q, k, v, *rules) is None and not lse
    return attend(sparse_fwd, choose(backend, sparse_fwd, *x, cuda=few), sinks, *x)
