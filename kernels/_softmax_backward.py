"""The backward of softmax attention on a tile of queries and keys: what local and sparse share.

    P = 2^(S−L),  dS = P∘(dO Vᵀ − Δ),  Δ = Σ dO∘O,  dQ += dS K,  dV += PᵀdO,  dK += dSᵀQ

Dao 2023, "FlashAttention-2", algorithm 2; scores and pieces as in _softmax.py.
"""

import triton
import triton.language as tl

from ._softmax import LOG2E, biased, capped, similarity
from ._tiles import dot, sound, tile


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
def steepness(s, cap):
    """1 − tanh² of a score as `capped` gives it."""
    bent = s / (cap * LOG2E)
    return 1.0 - bent * bent


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
    cap, slope, shift,
    HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (m, BD) / scale with the keys j; x, g are the tiles of q and do, lse and delta (m,),
    seen, shift and HIDES as in forward_tile."""
    at = j
    if HIDES:
        at, mark = sound(k, k_n, j, stop_j, d0, D, BD)
    y = tile(k, k_n, at if D <= BD else j, stop_j, 0, D, BD)
    s = similarity(x, y, q, q_n, i, stop_i, k, k_n, j, stop_j, D, BD, PRECISION)
    s = capped(s, scale, cap)
    if cap is not None:
        steep = steepness(s, cap)
    s = biased(s, i[:, None] + shift, j[None, :], slope) - (lse * LOG2E)[:, None]
    if HIDES:
        s += mark[None, :]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    z = tile(v, v_n, j, stop_j, 0, DV, BV)
    dp = similarity(g, z, do, do_n, i, stop_i, v, v_n, j, stop_j, DV, BV, PRECISION)
    ds = tl.exp2(s) * (dp - delta[:, None])
    if cap is not None:
        ds *= steep
    if HIDES:
        ds = tl.where(seen, ds, 0.0)
    y = piece(y, k, k_n, at, stop_j, d0, D, BD)
    return dq + dot(
        ds, y, "tf32" if PRECISION == "fp16" else PRECISION, "b"
    )  # dS can overflow float16


@triton.jit
def grad_kv_tile(
    dk, dv, y, z, lse, delta, q, q_n, do, do_n, i, stop_i, k, k_n, v, v_n, j, stop_j, d0, v0,
    seen, scale, cap, slope, shift,
    HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (n, BD) / scale and dv (n, BV) with the queries i; y, z are the tiles of k and v, seen is
    (n, m), lse and delta start at token 0. A query from stop_i on has L = ∞: weight 0."""
    at_q, at_g = i, i
    if HIDES:
        at_q, mark_q = sound(q, q_n, i, stop_i, d0, D, BD)
        at_g, mark_g = sound(do, do_n, i, stop_i, v0, DV, BV)
    x = tile(q, q_n, at_q if D <= BD else i, stop_i, 0, D, BD)
    s = similarity(y, x, k, k_n, j, stop_j, q, q_n, i, stop_i, D, BD, PRECISION)
    top = tl.load(lse + i, mask=i < stop_i, other=float("inf"))
    s = capped(s, scale, cap)
    if cap is not None:
        steep = steepness(s, cap)
    s = biased(s, j[:, None], i[None, :] + shift, slope) - (top * LOG2E)[None, :]
    if HIDES:
        s += (mark_q + mark_g)[None, :]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s)
    g = tile(do, do_n, at_g if DV <= BV else i, stop_i, 0, DV, BV)
    dv += dot(p, piece(g, do, do_n, at_g, stop_i, v0, DV, BV), PRECISION)
    dp = similarity(z, g, v, v_n, j, stop_j, do, do_n, i, stop_i, DV, BV, PRECISION)
    ds = p * (dp - tl.load(delta + i, mask=i < stop_i, other=0.0)[None, :])
    if cap is not None:
        ds *= steep
    if HIDES:
        ds = tl.where(seen, ds, 0.0)
    x = piece(x, q, q_n, at_q, stop_i, d0, D, BD)
    return dk + dot(ds, x, "tf32" if PRECISION == "fp16" else PRECISION, "b"), dv
