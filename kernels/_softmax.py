"""Softmax attention on one tile of queries and keys, for the kernels of local and sparse.

    forward   m' = max(m, max_j s_j),  l' = l·2^(m−m') + Σ_j 2^(s_j−m'),  likewise o'
    backward  P = 2^(S−L),  dS = P∘(dO Vᵀ − Δ),  dQ += dS K,  dV += PᵀdO,  dK += dSᵀQ

Dao 2023, "FlashAttention-2", algorithms 1 and 2; scores are scale·log₂e·QKᵀ, so that exp is exp2.
A head wider than one tile is read in pieces of BD and BV columns: scores sum over the pieces, and a
program owns one piece of what it writes, so nothing here limits D or Dv.
"""

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, block, dot, outside, precision, rounded, tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a (m, k) · b (k, n) -> (m, n) float32 of inputs and probabilities: all fit float16."""
    if PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        return dot(a, b, PRECISION)


@triton.jit
def wide_product(a, b, PRECISION: tl.constexpr):
    """The same where a is dS, which can overflow float16."""
    return dot(a, b, "tf32" if PRECISION == "fp16" else PRECISION)


@triton.jit
def turned(x, PRECISION: tl.constexpr):
    """xᵀ for `product`, in its type first: bits that are moved as loaded are turned by addressing
    shared memory, not through registers."""
    if PRECISION == "fp16":
        x = x.to(tl.float16)
    elif PRECISION == "bf16":
        x = rounded(x) if INTERPRETED else x.to(tl.bfloat16)
    return tl.trans(x)


@triton.jit
def similarity(
    x, y, a, a_n, i, stop_i, b, b_n, j, stop_j,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[i] b[j]ᵀ. x and y are their tiles of the first BLOCK columns."""
    if SIZE <= BLOCK:
        return product(x, turned(y, PRECISION), PRECISION)
    else:
        s = product(x, turned(y, PRECISION), PRECISION)
        for d in range(BLOCK, SIZE, BLOCK):
            x = tile(a, a_n, i, stop_i, d, SIZE, BLOCK)
            y = tile(b, b_n, j, stop_j, d, SIZE, BLOCK)
            s += product(x, turned(y, PRECISION), PRECISION)
        return s


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
def finite(x):
    """−∞ -> 0, so that −∞ − x is −∞ and never NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def merge(o, top, total, s, PRECISION: tl.constexpr):
    """New scores (m, n) in base 2 -> their weights, and o, top, total brought to the new top."""
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - finite(new)[:, None])
    shrink = tl.exp2(top - finite(new))
    return p, o * shrink[:, None], new, total * shrink + tl.sum(p, 1)


@triton.jit
def forward_tile(
    o, top, total, x, q, q_n, i, stop_i, k, k_n, v, v_n, j, stop_j, v0, seen, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o (m, BV), top (m,), total (m,) with the keys j; x is q's tile, seen (m, n) or None: all."""
    y = tile(k, k_n, j, stop_j, 0, D, BD)
    s = similarity(x, y, q, q_n, i, stop_i, k, k_n, j, stop_j, D, BD, PRECISION)
    s *= scale * LOG2E
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    p, o, top, total = merge(o, top, total, s, PRECISION)
    return o + product(p, tile(v, v_n, j, stop_j, v0, DV, BV), PRECISION), top, total


@triton.jit
def finish(o, top, total):
    """-> o (m, BV), 0 where nothing was seen; L (m,), natural, −∞ there."""
    empty = total == 0
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    return o / tl.where(empty, 1.0, total)[:, None], lse


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


# --- launching ------------------------------------------------------------------------------------


def limit(q, *_) -> str | None:
    return outside(q)


def meta(q, v, backward=False) -> dict:
    """The compile-time arguments that every kernel here takes."""
    d, dv = q.shape[-1], v.shape[-1]
    full = q.dtype == torch.float32  # tf32x3 holds three times the operands: narrow tiles
    # In the backward two heads' pieces of 128 columns and their products exceed an A100's memory.
    most = 64 if full or (backward and max(d, dv) > 128) else 128
    bd, bv = block(d, most), block(dv, most)
    return {
        "D": d, "DV": dv, "BD": bd, "BV": bv,
        "PRECISION": "fp16" if q.dtype == torch.float16 else precision(q),
        "num_warps": 8 if full or max(d, dv) > 64 else 4, "num_stages": 2,
    }  # fmt: skip


def tokens(q, most: int) -> int:
    """Tokens in a tile, for stretches of at most `most`."""
    return block(most, 32 if q.dtype == torch.float32 else 64)


def pieces(size: int, block: int) -> int:
    return -(-size // block)


def strided(x):
    """A tensor as kernels take it: first element, strides of batch, head and token."""
    return x, *x.stride()[:3]
