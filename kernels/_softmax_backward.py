"""The backward of softmax attention on a tile of queries and keys: what local and sparse share.

    P = 2^(S−L),  dS = P∘(dO Vᵀ − Δ),  Δ = Σ dO∘O,  dQ += dS K,  dV += PᵀdO,  dK += dSᵀQ

Dao 2023, "FlashAttention-2", algorithm 2; scores and pieces as in _softmax.py.
"""

import triton
import triton.language as tl

from ._softmax import LOG2E, product, similarity
from ._tiles import dot, tile


@triton.jit
def wide_product(a, b, PRECISION: tl.constexpr):
    """The same where a is dS, which can overflow float16."""
    return dot(a, b, "tf32" if PRECISION == "fp16" else PRECISION)


@triton.jit
def piece(
    x, ptr, stride, rows, stop, first, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Columns first … first + BLOCK, where x is the tile of the first BLOCK columns."""
    if SIZE <= BLOCK:
        return x
    else:
        return tile(ptr, stride, rows, stop, first, SIZE, BLOCK)


@triton.jit
def row_sums(do, do_n, o, o_n, i, stop, DV: tl.constexpr, BV: tl.constexpr):
    """Δ_i = Σ do_i∘o_i"""
    delta = tl.zeros(i.shape, tl.float32)
    for v0 in range(0, DV, BV):
        g = tile(do, do_n, i, stop, v0, DV, BV)
        delta += tl.sum(g * tile(o, o_n, i, stop, v0, DV, BV), 1)
    return delta


@triton.jit
def grad_q_tile(
    dq, x, g, lse, delta, q, q_n, do, do_n, i, stop_i, k, k_n, v, v_n, j, stop_j, d0, seen, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (m, BD) / scale with the keys j; x, g are the tiles of q and do, lse and delta (m,)."""
    y = tile(k, k_n, j, stop_j, 0, D, BD)
    s = similarity(x, y, q, q_n, i, stop_i, k, k_n, j, stop_j, D, BD, PRECISION)
    s = s * (scale * LOG2E) - (lse * LOG2E)[:, None]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    z = tile(v, v_n, j, stop_j, 0, DV, BV)
    dp = similarity(g, z, do, do_n, i, stop_i, v, v_n, j, stop_j, DV, BV, PRECISION)
    ds = tl.exp2(s) * (dp - delta[:, None])
    return dq + wide_product(ds, piece(y, k, k_n, j, stop_j, d0, D, BD), PRECISION)


@triton.jit
def grad_kv_tile(
    dk, dv, y, z, lse, delta, q, q_n, do, do_n, i, stop_i, k, k_n, v, v_n, j, stop_j, d0, v0,
    seen, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (n, BD) / scale and dv (n, BV) with the queries i; y, z are the tiles of k and v, seen is
    (n, m), lse and delta start at token 0. A query from stop_i on has L = ∞: weight 0."""
    x = tile(q, q_n, i, stop_i, 0, D, BD)
    s = similarity(y, x, k, k_n, j, stop_j, q, q_n, i, stop_i, D, BD, PRECISION)
    top = tl.load(lse + i, mask=i < stop_i, other=float("inf"))
    s = s * (scale * LOG2E) - (top * LOG2E)[None, :]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s)
    g = tile(do, do_n, i, stop_i, 0, DV, BV)
    dv += product(p, piece(g, do, do_n, i, stop_i, v0, DV, BV), PRECISION)
    dp = similarity(z, g, v, v_n, j, stop_j, do, do_n, i, stop_i, DV, BV, PRECISION)
    ds = p * (dp - tl.load(delta + i, mask=i < stop_i, other=0.0)[None, :])
    return dk + wide_product(ds, piece(x, q, q_n, i, stop_i, d0, D, BD), PRECISION), dv
