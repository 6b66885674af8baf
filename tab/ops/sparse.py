"""Block-sparse attention: softmax over the blocks of keys that a pattern lists for each block of
queries.

    o_i = Σ_{j∈A(i)} exp(s_ij − L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈A(i)} exp s_ij
    A(i) = {j : block ⌊j/b⌋ is listed for block ⌊i/b⌋ of this head}, causal: and j ≤ i

Zaheer et al. 2020, "Big Bird", sec. 2 and appendix D. A row that sees nothing gives 0 and passes no
gradient. Read top to bottom: ops → autograd → public function. The reference is in
sparse_reference.py.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ._check import Layout, as_given, check_causal, check_key_mask, check_qkv, heads_first
from ._op import Backend, Op, choose
from ._scores import check_scores
from ._softmax import check_lse_gradient, lse_as_column, plain_softmax, score_scale
from .merge import merge_sinks
from .pattern import BlockPattern
from .sparse_reference import backward_reference, forward_reference

# --- ops ------------------------------------------------------------------------------------------


# row_ptr, col, col_ptr, row: the pattern and its transpose, int32, see BlockPattern; row_ptr and
# col_ptr are (Hp, nb+1) with Hp = 1 (shared by the heads) or H. slopes and softcap as in local.py.
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


sparse_fwd = Op(
    "sparse_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor col_ptr, Tensor row, "
    "Tensor? key_mask, Tensor? slopes, int block_size, bool causal, float scale, float softcap) "
    "-> (Tensor o, Tensor lse)",
    forward_reference,
    flops=_flops,
)
sparse_bwd = Op(
    "sparse_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor row_ptr, Tensor col, "
    "Tensor col_ptr, Tensor row, Tensor? key_mask, Tensor? slopes, int block_size, bool causal, "
    "float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
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
    key_mask: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
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
    key_mask: Tensor | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
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
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
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
        key_mask: (B, N) bool, True where a token is real; what the others hold, NaN too, reaches
            no real token, forward or backward. A query that sees no key gives 0.
        sinks: (H,), a logit for each head that joins the sum of every softmax without a value: the
            weights of a row sum to less than 1 (`tab.merge_sinks`). Learned where it requires grad.
        softcap: c > 0 bends the scores to c·tanh(s/c) (Gemma 2 2024, sec. 2), before alibi.
        alibi: (H,), slopes m: m·|i − j| is subtracted from the scores (Press et al. 2021, "Train
            short, test long"); without gradient.
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
    check_key_mask("sparse_attention", key_mask, q)
    cap, slopes = check_scores("sparse_attention", q, sinks, softcap, alibi)
    # The kernel is faster than dense SDPA even at density 1, so "auto" never leaves it. float32,
    # one Zen 5 core, kernel and SDPA in ms, forward, then with backward:
    #   B 128 H 4 N 64 D 64, blocks of 8   5.7 and 9.0,  18.1 and 31.4
    #   B 1 H 2 N 1024 D 64, blocks of 64  2.6 and 5.6,   8.8 and 20.0
    rules = key_mask, slopes, pattern.block_size, causal, scale, cap
    few = q.is_cuda and plain_softmax(q, k, v, *rules) is None and not return_lse and sinks is None
    x = q, k, v, *pattern.tensors, *rules
    backend = choose(backend, sparse_fwd, *x, cuda=few)
    o, lse = sparse_fwd.apply(backend, *x)
    if sinks is not None:
        o, lse = merge_sinks(o, lse, sinks)
    return (as_given(layout, o), lse) if return_lse else as_given(layout, o)
