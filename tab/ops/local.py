"""Local attention: softmax over a window of keys around each query.

    o_i = Σ_{j∈W(i)} exp(s_ij − L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈W(i)} exp s_ij
    line:  W(i) = {j : p_i − left ≤ j ≤ p_i + right},  p_i = i + N_k − N_q
    grid:  W(i) = {j : −left ≤ row(j) − row(i) ≤ right and −left ≤ col(j) − col(i) ≤ right},
           row(i) = ⌊i/cols⌋, col(i) = i mod cols

p_i is where query i stands among the keys: the queries are the last of them. Edges truncate.
Beltagy et al. 2020, "Longformer", sec. 3.1 (line); Ramachandran et al. 2019, "Stand-Alone
Self-Attention in Vision Models", eq. 2 (grid).

Read top to bottom: ops → autograd → public function. The reference is in local_reference.py.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._check import Layout, check_key_mask, check_qkv
from ._op import Backend, Op, choose
from ._options import boolean, check_causal
from ._packed import pack, pack_rows, refuse_packed, unpack
from ._packed_op import packed
from ._scores import check_scores
from ._sinks_op import attend, with_sinks
from ._softmax import check_lse_gradient, lse_as_column, plain_softmax, score_scale
from .local_reference import backward_reference, forward_reference, tiles

# --- ops ------------------------------------------------------------------------------------------


# rows = cols = 0: a line. 0 ≤ left, right < N (grid: < max(rows, cols)): no kernel overflows.
# causal: only j ≤ p_i. On a line the public function has set right = 0 and causal = False.
# slopes: (H,) in the accumulation type, ALiBi's m. softcap: 0 for none.
def _pairs(q, k, left, right, cols, causal) -> int:
    """Query-key pairs that the windows hold; no N × N of them is held at once."""
    (b, h, n, _), m = q, k[2]
    queries, keys = (torch.empty(length, 0, device="cpu") for length in (n, m))
    seen = (each.sum() for *_, each in tiles(queries, keys, left, right, cols, causal))
    return b * h * int(sum(seen))


def _flops(q, k, v, key_mask, slopes, left, right, rows, cols, causal, *_, **__) -> int:
    """Scores and sums: 2·(D + Dv) a pair."""
    return 2 * _pairs(q, k, left, right, cols, causal) * (q[-1] + v[-1])


def _backward_flops(
    do, q, k, v, o, lse, key_mask, slopes, left, right, rows, cols, causal, *_, **__
) -> int:  # fmt: skip
    """Scores, do·v, dq, dk and dv: 2·(3·D + 2·Dv) a pair."""
    return 2 * _pairs(q, k, left, right, cols, causal) * (3 * q[-1] + 2 * v[-1])


SHAPES = """
    q: B H N D
    k: B K M D
    v: B K M E
    o do: B H N E
    lse: B H N
    key_mask: B M bool
    slopes: H
    where: K and H % K == 0
    where: left >= 0 <= right
    where: rows == cols == 0 or rows > 0 < cols and rows * cols == N == M
"""
local_fwd = Op(
    "local_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? slopes, SymInt left, SymInt right, "
    "SymInt rows, SymInt cols, bool causal, float scale, float softcap) -> (Tensor o, Tensor lse)",
    forward_reference,
    flops=_flops,
    shapes=SHAPES,
)
local_bwd = Op(
    "local_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? key_mask, "
    "Tensor? slopes, SymInt left, SymInt right, SymInt rows, SymInt cols, bool causal, "
    "float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
    shapes=SHAPES,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, key_mask, slopes, o, lse, *options):
    do, dlse = grads
    if do is None and dlse is None:
        return ()
    if dlse is not None:
        check_lse_gradient("local_bwd", backend)
        do, v, o = lse_as_column(do, dlse, v, o)
    dq, dk, dv = local_bwd.below(backend, do, q, k, v, o, lse, key_mask, slopes, *options)
    return dq, dk, dv if dlse is None else dv[..., :-1]


local_fwd.takes["cuda"] = plain_softmax
local_fwd.differentiable(_gradients, by=local_bwd)


def _fit(n, left, right, *rest):
    """The options for a sequence of N tokens: no two lie further apart than N − 1."""
    return min(left, max(n, 1) - 1), min(right, max(n, 1) - 1), *rest


local_packed = packed("local_attention", local_fwd, local_bwd, _gradients, fit=_fit)
with_sinks(local_fwd)
with_sinks(local_packed)

# --- public ---------------------------------------------------------------------------------------


@overload
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    causal: bool = ...,
    is_causal: bool | None = ...,
    grid: tuple[int, int] | None = ...,
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
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    causal: bool = ...,
    is_causal: bool | None = ...,
    grid: tuple[int, int] | None = ...,
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


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | tuple[int, int],
    causal: bool = False,
    is_causal: bool | None = None,
    grid: tuple[int, int] | None = None,
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
    """Softmax attention within a window, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over the keys
    p_i − left ≤ j ≤ p_i + right, p_i = i + N_k − N_q (Beltagy et al. 2020, sec. 3.1; on a grid
    Ramachandran et al. 2019).

    Args:
        q: (B, H, N, D); k: (B, H_kv, N_k, D); v: (B, H_kv, N_k, Dv). One floating dtype, one
            device. Sums run in float32. With more or fewer keys than queries (cross-attention, or
            the last tokens of a sequence) the last query stands at the last key, as flash-attention
            aligns them; one before the first key may see nothing. H_kv divides H: head h of q
            attends with head ⌊h·H_kv/H⌋ of k and v (grouped-query attention, Ainslie et al. 2023;
            multi-query with H_kv = 1), which kernels read in place.
        window: (left, right), both inclusive, or one number for both; 0 sees only itself. Any size:
            edges truncate.
        causal: only keys j ≤ p_i. On a line that is right = 0. On a grid the order is the raster's:
            the rows above within the window, whole, and the row itself up to i.
        grid: (rows, cols), rows · cols = N = N_k: the tokens are the cells of an image in raster
            order, and the window is two-dimensional: left upwards and to the left, right downwards
            and to the right. Without it a window wraps around the edges of an image.
        is_causal: another name of `causal`.
        scale: of the scores, 1/√D unless given.
        key_mask: (B, N_k) bool, True where a token is real; what the others hold, NaN too, reaches
            no real token, forward or backward. With N ≠ N_k it is of keys alone. A query that sees
            no key gives 0.
        sinks: (H,), a logit for each head that joins the sum of every softmax without a value: the
            weights of a row sum to less than 1 (`tab.merge_sinks`). Learned where it requires grad.
        softcap: c > 0 bends the scores to c·tanh(s/c) (Gemma 2 2024, sec. 2), before alibi.
        alibi: (H,), slopes m: m·|p_i − j| is subtracted from the scores (Press et al. 2021, "Train
            short, test long"), on a line only; without gradient.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            A sequence may be empty. Not with a grid. On a GPU reading the ends waits.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        return_lse: also return L_i = log Σ_j exp(s_ij), sinks included, differentiable; parts of
            the keys merge by it (`tab.merge_attention`).
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, lse), lse (B, H, N) float32 (float64 for
        float64 input) in both layouts; where a token sees nothing 0 and −∞, or the sink.

    Raises:
        ValueError: shapes, dtypes, devices, window or grid do not fit; the message says how.
        TypeError: scale or softcap is a tensor.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: an image of 8 × 8 patches, each with its eight neighbours.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> tab.local_attention(q, k, v, window=1, grid=(8, 8)).shape
        torch.Size([2, 4, 64, 32])

    Sequences of 5 and of 9 tokens, without padding.
        >>> x = [torch.randn(5, 4, 32), torch.randn(9, 4, 32)]  # each (N_s, H, D)
        >>> x = torch.nested.nested_tensor(x, layout=torch.jagged).transpose(1, 2)
        >>> [tuple(o.shape) for o in tab.local_attention(x, x, x, window=3).unbind()]
        [(4, 5, 32), (4, 9, 32)]
    """
    (q, k, v), packing = unpack("local_attention", layout, cu_seqlens, q=q, k=k, v=v)
    cross = grid is None
    q, k, v = check_qkv("local_attention", q, k, v, grouped=True, cross=cross, layout=layout)
    causal = check_causal("local_attention", causal, is_causal)
    boolean("local_attention", "return_lse", return_lse)
    n = q.shape[2]
    left, right = check_window("local_attention", window)
    if grid is not None:
        refuse_packed(
            "local_attention", packing, "grid", "images of one size are a batch (B, H, N, D)"
        )
    rows, cols = check_grid("local_attention", grid, n) if grid is not None else (0, 0)
    if alibi is not None and grid is not None:
        raise ValueError(
            "local_attention takes alibi on a line only: on a grid i − j is no distance; leave "
            "grid or alibi out"
        )
    # No two tokens lie further apart. min and max stay symbolic under torch.compile: no new
    # compilation for every new length.
    reach = max(rows, cols, 1) - 1 if grid is not None else max(n, k.shape[2], 1) - 1
    left, right = min(left, reach), min(right, reach)
    if causal and not cols:
        right, causal = 0, False
    scale = score_scale("local_attention", scale, q.shape[-1])
    check_key_mask("local_attention", key_mask, k)
    cap, slopes = check_scores("local_attention", q, sinks, softcap, alibi)
    # The kernel is faster than dense SDPA even when the window holds every token, so "auto" never
    # leaves it. float32, one Zen 5 core, kernel and SDPA in ms, forward, then with backward:
    #   B 128 H 4 N 64 D 64     5.8 and  9.3,  18.4 and 29.2 (window 8: 4.8 and 9.1, 14.6 and 28.7)
    #   B 512 H 4 N 16 D 32     2.7 and  3.3,   9.1 and 10.3
    #   B 1 H 2 N 1024 D 64     2.6 and  5.6,   8.9 and 19.9
    op, cuts = (local_fwd, ()) if packing is None else (local_packed, packing[:1])
    x = q, k, v, key_mask, slopes, *cuts, left, right, rows, cols, causal, scale, cap
    few = q.is_cuda and plain_softmax(*x) is None and not return_lse
    backend = choose(backend, op, *x, cuda=few)
    o, lse = attend(op, backend, sinks, *x)
    o = pack(layout, o, packing)
    return (o, pack_rows(lse, packing)) if return_lse else o


def check_window(op: str, window: int | tuple[int, int]) -> tuple[int, int]:
    """-> (left, right), both ≥ 0, or a ValueError with the nearest valid window."""
    if type(window) is int and window >= 0:
        return window, window
    pair = (window, window) if isinstance(window, int) else window
    whole = isinstance(pair, (tuple, list)) and [type(w) for w in pair] == [int, int]
    if not whole or min(pair) < 0:
        near = f"; nearest: {tuple(max(w, 0) for w in pair)}" if whole else ""
        raise ValueError(
            f"{op} wants window ≥ 0 or (left, right) ≥ 0, whole numbers of tokens; "
            f"got window={window!r}{near}"
        )
    return pair[0], pair[1]


def check_grid(op: str, grid: tuple[int, int], n: int) -> tuple[int, int]:
    """-> (rows, cols), or a ValueError that names both numbers of tokens."""
    pair = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not pair or min(grid) < 0 or grid[0] * grid[1] != n:
        near = min(
            (d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - n**0.5), default=1
        )
        raise ValueError(
            f"{op} wants grid (rows, cols) with rows · cols = N = {n}, got grid={grid}; "
            f"the squarest grid of {n} tokens is {(near, n // near)}"
        )
    return int(grid[0]), int(grid[1])
