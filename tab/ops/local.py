"""Local attention: softmax over a window of keys around each query.

    o_i = Σ_{j∈W(i)} exp(s_ij − L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈W(i)} exp s_ij
    line:  W(i) = {j : i − left ≤ j ≤ i + right}
    grid:  W(i) = {j : −left ≤ row(j) − row(i) ≤ right and −left ≤ col(j) − col(i) ≤ right},
           row(i) = ⌊i/cols⌋, col(i) = i mod cols

Edges truncate. Beltagy et al. 2020, "Longformer", sec. 3.1 (line); Ramachandran et al. 2019,
"Stand-Alone Self-Attention in Vision Models", eq. 2 (grid). W(i) always holds i itself.

The reference walks over chunks of queries. Their keys lie in one contiguous band with closed-form
ends (on a grid: whole rows), so it holds CHUNK × band scores at a time and never N × N.
Read top to bottom: reference → ops → autograd → public function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor

from ._check import (
    Layout,
    accumulate,
    check_causal,
    check_qkv,
    token_major,
)
from ._op import Backend, Op, choose
from ._packed import pack, pack_rows, refuse_packed, unpack
from ._packed_op import packed
from ._softmax import (
    check_lse_gradient,
    empty_heads,
    empty_outputs,
    lse_as_column,
    own_heads,
    row_sums,
    score_scale,
    shared_heads,
    softmax_backward,
    softmax_forward,
)

CHUNK = 64  # queries whose scores the reference holds at once

# --- reference ------------------------------------------------------------------------------------


def in_window(i: Tensor, j: Tensor, left: int, right: int, cols: int, causal: bool) -> Tensor:
    """Whether query i sees key j (tensors that broadcast). cols 0: the tokens are a line."""
    if cols:
        down, across = j // cols - i // cols, j % cols - i % cols
        seen = (down >= -left) & (down <= right) & (across >= -left) & (across <= right)
    else:
        seen = (j - i >= -left) & (j - i <= right)
    return seen & (j <= i) if causal else seen


def tiles(
    q: Tensor, left: int, right: int, cols: int, causal: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Per chunk of queries: the queries, the band of keys that they can see, who sees whom."""
    n, width = q.shape[-2], cols or 1  # on a line every token is its own row
    for start in range(0, max(n, 1), CHUNK):  # without tokens one empty tile
        stop = min(start + CHUNK, n)
        first = max(0, (start // width - left) * width)
        last = stop if causal else min(n, ((stop - 1) // width + right + 1) * width)
        i = torch.arange(start, stop, device=q.device)[:, None]
        j = torch.arange(first, last, device=q.device)
        seen = in_window(i, j, left, right, cols, causal)  # (≤ CHUNK, band)
        yield slice(start, stop), slice(first, last), seen


def forward_reference(q, k, v, left, right, rows, cols, causal, scale):
    """-> o (B, H, N, Dv), lse (B, H, N) in the accumulation type."""
    acc = accumulate(q)
    if q.is_meta:  # shapes need no walk
        return empty_outputs(q, v, acc)
    dtype, parts = q.dtype, []
    q, k, v = shared_heads(k.shape[1], q.to(acc), k.to(acc), v.to(acc))
    for i, j, seen in tiles(q, left, right, cols, causal):
        tile = q[..., i, :], k[..., j, :], v[..., j, :]
        parts.append(softmax_forward(*tile, seen, scale)[:2])
    o, lse = (torch.cat([x[which] for x in parts], dim) for which, dim in ((0, -2), (1, -1)))
    if o.dim() == 5:
        o, lse = o.flatten(1, 2), lse.flatten(1, 2)
    return token_major(o.to(dtype)), lse


def backward_reference(do, q, k, v, o, lse, left, right, rows, cols, causal, scale):
    """-> dq, dk, dv. P is recomputed tile by tile from lse; Δ = Σ do∘o."""
    if q.is_meta:
        return empty_heads(q), empty_heads(k), empty_heads(v)
    acc, dtype, shape = accumulate(q), q.dtype, q.shape
    do, q, k, v = do.to(acc), q.to(acc), k.to(acc), v.to(acc)
    delta = row_sums(do, o.to(acc))  # (B, H, N)
    dq, dk, dv = [], do.new_zeros(k.shape), do.new_zeros(v.shape)
    do, q, k, v, lse, delta = shared_heads(k.shape[1], do, q, k, v, lse, delta)
    for i, j, seen in tiles(q, left, right, cols, causal):
        tile = do[..., i, :], q[..., i, :], k[..., j, :], v[..., j, :], lse[..., i], delta[..., i]
        dq_tile, dk_tile, dv_tile = softmax_backward(*tile, seen, scale)
        dq.append(dq_tile)
        dk[:, :, j] += dk_tile if dk_tile.dim() == 4 else dk_tile.sum(2)
        dv[:, :, j] += dv_tile if dv_tile.dim() == 4 else dv_tile.sum(2)
    return tuple(token_major(x.to(dtype)) for x in (torch.cat(dq, -2).view(shape), dk, dv))


# --- ops ------------------------------------------------------------------------------------------


# rows = cols = 0: a line. 0 ≤ left, right < N (grid: < max(rows, cols)): no kernel overflows.
# causal: only j ≤ i. On a line the public function has set right = 0 instead, and causal is False.
def _pairs(q, left, right, cols, causal) -> int:
    """Query-key pairs that the windows hold."""
    b, h, n, _ = q
    i = torch.arange(n)
    return b * h * in_window(i[:, None], i, left, right, cols, causal).sum().item()


def _flops(q, k, v, left, right, rows, cols, causal, *_, **__) -> int:
    """Scores and sums: 2·(D + Dv) a pair."""
    return 2 * _pairs(q, left, right, cols, causal) * (q[-1] + v[-1])


def _backward_flops(do, q, k, v, o, lse, left, right, rows, cols, causal, *_, **__) -> int:
    """Scores, do·v, dq, dk and dv: 2·(3·D + 2·Dv) a pair."""
    return 2 * _pairs(q, left, right, cols, causal) * (3 * q[-1] + 2 * v[-1])


local_fwd = Op(
    "local_fwd",
    "(Tensor q, Tensor k, Tensor v, SymInt left, SymInt right, SymInt rows, SymInt cols, "
    "bool causal, float scale) -> (Tensor o, Tensor lse)",
    forward_reference,
    flops=_flops,
)
local_bwd = Op(
    "local_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, SymInt left, SymInt right, "
    "SymInt rows, SymInt cols, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, o, lse, *options):
    do, dlse = grads
    if do is None and dlse is None:
        return ()
    if dlse is not None:
        check_lse_gradient("local_bwd", backend)
        do, v, o = lse_as_column(do, dlse, v, o)
    dq, dk, dv = local_bwd.below(backend, do, q, k, v, o, lse, *options)
    return dq, dk, dv if dlse is None else dv[..., :-1]


local_fwd.takes["cuda"] = own_heads
local_fwd.differentiable(_gradients, by=local_bwd)


def _fit(n, left, right, *rest):
    """The options for a sequence of N tokens: no two lie further apart than N − 1."""
    return min(left, max(n, 1) - 1), min(right, max(n, 1) - 1), *rest


local_packed = packed(local_fwd, local_bwd, _gradients, fit=_fit)

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
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within a window, `o_i = Σ_j softmax_j(scale·q_i·k_j) v_j` over the keys
    i − left ≤ j ≤ i + right (Beltagy et al. 2020, sec. 3.1; on a grid Ramachandran et al. 2019).

    Args:
        q: (B, H, N, D); k: (B, H_kv, N, D); v: (B, H_kv, N, Dv). One floating dtype, one device.
            Sums run in float32. H_kv divides H: head h of q attends with head ⌊h·H_kv/H⌋ of k and v
            (grouped-query attention, Ainslie et al. 2023; multi-query with H_kv = 1), which the C++
            kernel reads in place.
        window: (left, right), both inclusive, or one number for both; 0 sees only itself. Any size:
            edges truncate.
        causal: only keys j ≤ i. On a line that is right = 0. On a grid the order is the raster's:
            the rows above within the window, whole, and the row itself up to i.
        grid: (rows, cols), rows · cols = N: the tokens are the cells of an image in raster order,
            and the window is two-dimensional: left upwards and to the left, right downwards and to
            the right. Without it a window wraps around the edges of an image.
        is_causal: another name of `causal`.
        scale: of the scores, 1/√D unless given.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            A sequence may be empty. Not with a grid. On a GPU reading the ends waits.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        return_lse: also return L_i = log Σ_j exp(s_ij), differentiable; parts of the keys merge by
            it (`tab.merge_attention`).
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, lse), lse (B, H, N) float32 (float64 for
        float64 input) in both layouts.

    Raises:
        ValueError: shapes, dtypes, devices, window or grid do not fit; the message says how.
        TypeError: scale is a tensor.
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
    q, k, v = check_qkv("local_attention", q, k, v, grouped=True)
    causal = check_causal("local_attention", causal, is_causal)
    n = q.shape[2]
    left, right = check_window("local_attention", window)
    if grid is not None:
        refuse_packed(
            "local_attention", packing, "grid", "images of one size are a batch (B, H, N, D)"
        )
    rows, cols = check_grid("local_attention", grid, n) if grid is not None else (0, 0)
    # No two tokens lie further apart. min and max stay symbolic under torch.compile: no new
    # compilation for every new length.
    reach = max(rows, cols, 1) - 1 if grid is not None else max(n, 1) - 1
    left, right = min(left, reach), min(right, reach)
    if causal and not cols:
        right, causal = 0, False
    scale = score_scale("local_attention", scale, q.shape[-1])
    # The kernel is faster than dense SDPA even when the window holds every token, so "auto" never
    # leaves it. float32, one Zen 5 core, kernel and SDPA in ms, forward, then with backward:
    #   B 128 H 4 N 64 D 64     5.8 and  9.3,  18.4 and 29.2 (window 8: 4.8 and 9.1, 14.6 and 28.7)
    #   B 512 H 4 N 16 D 32     2.7 and  3.3,   9.1 and 10.3
    #   B 1 H 2 N 1024 D 64     2.6 and  5.6,   8.9 and 19.9
    op, cuts = (local_fwd, ()) if packing is None else (local_packed, packing[:1])
    backend = choose(backend, op, q, k, cuda=k.shape[1] == q.shape[1] and not return_lse)
    o, lse = op.apply(backend, q, k, v, *cuts, left, right, rows, cols, causal, scale)
    o = pack(layout, o, packing)
    return (o, pack_rows(lse, packing)) if return_lse else o


def check_window(op: str, window: int | tuple[int, int]) -> tuple[int, int]:
    """-> (left, right), both ≥ 0, or a ValueError with the nearest valid window."""
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
