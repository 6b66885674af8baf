"""Softmax attention on a tile of queries and keys: what local, sparse and mla share.

    m' = max(m, max_j s_j),  l' = l·2^(m−m') + Σ_j 2^(s_j−m'),  likewise o'

Dao 2023, "FlashAttention-2", algorithm 1; scores are scale·log₂e·QKᵀ, so that exp is exp2. Local
and sparse read a head wider than one tile in pieces of BD and BV columns: scores sum over the
pieces, and a program owns one piece of what it writes, so nothing here limits D or Dv.
"""

import torch
import triton
import triton.language as tl

from ._launch import block, meta_heads, outside, precision
from ._tiles import INTERPRETED, dot, finite, rounded, sound, tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# --- online ---------------------------------------------------------------------------------------


@triton.jit
def merge(o, top, total, s):
    """New scores (m, n) in base 2 -> their weights, and o, top, total brought to the new top."""
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - finite(new)[:, None])
    shrink = tl.exp2(top - finite(new))
    return p, o * shrink[:, None], new, total * shrink + tl.sum(p, 1)


@triton.jit
def fold(o, top, total, x, lse):
    """The same with a part of the keys that is finished: its o and L, x (m, BV) and lse (m,)."""
    s = lse * LOG2E
    new = tl.maximum(top, s)
    shrink, weight = tl.exp2(top - finite(new)), tl.exp2(s - finite(new))
    return o * shrink[:, None] + x * weight[:, None], new, total * shrink + weight


@triton.jit
def finish(o, top, total):
    """-> o (m, BV), 0 where nothing was seen; L (m,), natural, −∞ there."""
    empty = total == 0
    lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(tl.where(empty, 1.0, total)))
    return o / tl.where(empty, 1.0, total)[:, None], lse


# --- tiles of local and sparse --------------------------------------------------------------------


@triton.jit
def turned(x, PRECISION: tl.constexpr):
    """xᵀ for `dot`, in its type first: bits that are moved as loaded are turned by addressing
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
        return dot(x, turned(y, PRECISION), PRECISION)
    else:
        s = dot(x, turned(y, PRECISION), PRECISION)
        for d in range(BLOCK, SIZE, BLOCK):
            x = tile(a, a_n, i, stop_i, d, SIZE, BLOCK)
            y = tile(b, b_n, j, stop_j, d, SIZE, BLOCK)
            s += dot(x, turned(y, PRECISION), PRECISION)
        return s


# What may be done to the scores (tab/ops/_softmax.py), None where it is not: `cap`, a number, and
# `slope`, a pointer to the head's. Masked tokens are read from past the end, where there are zeros:
# keys, and queries that hold what is not finite.


@triton.jit
def tanh(x):
    """Of few terms below ⅝, which keeps the digits of small x; minimax."""
    z, size = x * x, tl.abs(x)
    near = -0.005704988 * z + 0.020639079
    near = (near * z - 0.053739715) * z + 0.133314422
    near = (near * z - 0.333332819) * z * x + x
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(s, scale, cap):
    """log₂e·S before the bias, of products s."""
    if cap is not None:
        return tanh(s * (scale / cap)) * (cap * LOG2E)
    else:
        return s * (scale * LOG2E)


@triton.jit
def biased(s, i, j, slope):
    """Minus ALiBi's log₂e·m·|i − j|; i and j broadcast against s."""
    if slope is not None:
        return s - tl.abs(i - j).to(tl.float32) * (tl.load(slope) * LOG2E)
    else:
        return s


@triton.jit
def real_keys(mask, b, j, N):
    """Whether the keys j of batch entry b are real, and where to read them."""
    real = tl.load(mask + b.to(tl.int64) * N + j, mask=j < N, other=0) != 0
    return real, tl.where(real, j, N)


@triton.jit
def quiet(mask, b, q, q_n, i, stop, N, M, D: tl.constexpr, BD: tl.constexpr):
    """Where to read the queries i of batch entry b. The mask is of M keys: where there are more or
    fewer queries, it is none of theirs."""
    if mask is not None:
        odd = tl.zeros(i.shape, tl.int32)
        for d in range(0, D, BD):
            finite = tl.abs(tile(q, q_n, i, stop, d, D, BD)) < float("inf")
            odd = tl.maximum(odd, 1 - tl.min(finite.to(tl.int32), 1))
        mine = (i < stop) & (N == M)
        real = tl.load(mask + b.to(tl.int64) * M + i, mask=mine, other=1) != 0
        return tl.where((odd != 0) & (real == 0), stop, i)
    else:
        return i


@triton.jit
def forward_tile(
    o, top, total, x, q, q_n, i, stop_i, k, k_n, v, v_n, j, stop_j, v0, seen, scale, cap, slope,
    shift,
    HIDES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o (m, BV), top (m,), total (m,) with the keys j; x is q's tile, seen (m, n) or None: all.
    HIDES: `seen` leaves out keys that are there, not only places past the end and masked ones.
    Query i stands at i + shift."""
    at = j
    if HIDES:
        at, mark = sound(v, v_n, j, stop_j, v0, DV, BV)
    y = tile(k, k_n, j, stop_j, 0, D, BD)
    s = similarity(x, y, q, q_n, i, stop_i, k, k_n, j, stop_j, D, BD, PRECISION)
    s = biased(capped(s, scale, cap), i[:, None] + shift, j[None, :], slope)
    if HIDES:
        s += mark[None, :]
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    p, o, top, total = merge(o, top, total, s)
    return o + dot(p, tile(v, v_n, at, stop_j, v0, DV, BV), PRECISION), top, total


# --- launching ------------------------------------------------------------------------------------


def takes(q, *_) -> str | None:
    return outside(q)


def meta(q, v, backward=False) -> dict:
    """The compile-time arguments that every kernel here takes."""
    d, dv = q.shape[-1], v.shape[-1]
    few = q if q.shape[2] < v.shape[2] else v
    full = q.dtype == torch.float32  # tf32x3 holds three times the operands: narrow tiles
    # In the backward two heads' pieces of 128 columns and their products exceed an A100's memory.
    most = 64 if full or (backward and max(d, dv) > 128) else 128
    bd, bv = block(d, most), block(dv, most)
    return {
        "D": d, "DV": dv, "BD": bd, "BV": bv,
        "PRECISION": "fp16" if q.dtype == torch.float16 else precision(few),
        "num_warps": 8 if full or max(d, dv) > 64 else 4, "num_stages": 2,
    }  # fmt: skip


def tokens(q, most: int) -> int:
    """Tokens in a tile, for stretches of at most `most`."""
    return block(most, 32 if q.dtype == torch.float32 else 64)


# --- compiled ahead -------------------------------------------------------------------------------


def heads():
    """q (2, 8, 8192, D), also in the place of k and v: a head in one tile and in several."""
    for d, dtype in (
        (64, torch.bfloat16),
        (64, torch.float32),
        (128, torch.bfloat16),
        (256, torch.bfloat16),
    ):
        yield meta_heads(2, 8, 8192, d, dtype)
