"""Causal performer by segments, for heads of one tile: a program walks over the tiles of a segment
with BM features of the state [S z] in registers, at a shift that moves with it, so that the pairs
of a token are those of its own tile; then with the next BM features. What those add up to waits in
memory, float32. Formula and symbols: tab/ops/performer.py.

The shift `top` after a tile knows keys that its queries do not. Any shift cancels from o, and the
products are right if it exceeds what they may know by at most FAR (_performer.py). Else (far) the
state stays at the shift before the tile, and pairs are added up one by one.
"""

import triton
import triton.language as tl

from ._launch import block
from ._performer import (
    FAR,
    NOTHING,
    factor,
    far_pairs,
    key_features,
    lows,
    query_features,
    vector,
)
from ._tiles import dot, finite, head, hide, put, tf32, tile

WALKS = {"bf16"}  # tf32 and tf32x3 hold twice and three times the operands
FEATURES = 64  # most in registers at once


def walks(m: dict, sums: int) -> dict | None:
    """The compile-time arguments of the kernels here that hold so many states, from those of the
    others; None where they are not launched."""
    if max(m["D"], m["DV"]) > m["BD"] or m["PRECISION"] not in WALKS:
        return None
    # Not measured: what spills least. With 64 tokens Triton has every four warps hold all of a
    # product's rows, so that eight do everything twice.
    return {**m, "BN": 32, "BM": block(m["M"], FEATURES), "num_warps": 4 * sums}


def waiting(w, m: dict, *sizes: int):
    """Memory for what blocks of features add up to, where there are several."""
    return w.new_empty(sizes if m["M"] > m["BM"] else 0)


# --- a tile ---------------------------------------------------------------------------------------


@triton.jit
def weights(w, m, D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """Wᵀ (BD, BM), rounded once for all tiles"""
    x = tl.trans(tile(w, D, m, M, 0, D, BD))
    return tf32(x) if EXACT == "tf32" else x


@triton.jit
def projected(x, stride, W, at, n, D: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """W x̂ (BN, BM) and ‖x̂‖²/2 (BN,) of tokens `at`"""
    part = tile(x, stride, at, n, 0, D, BD)
    return dot(part, W, EXACT, "ab") * D**-0.25, tl.sum(part * part, 1) * (0.5 * D**-0.5)


@triton.jit
def exponents(
    k, stride, W, mask, at, n, KERNEL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """a (BN, BM); -inf outside and where the mask (N,) is 0. Beyond M it is something finite."""
    a, norm = projected(k, stride, W, at, n, D, BD, EXACT)
    real = at < n
    if mask is not None:
        real = real & (tl.load(mask + at, mask=at < n, other=0) != 0)
    return a - tl.where(real, norm if KERNEL == 0 else 0.0, float("inf"))[:, None]


@triton.jit
def raised(seen, a, m, KERNEL: tl.constexpr, M: tl.constexpr):
    """The shift (BM,) after a tile; -inf beyond M, where so nothing is read"""
    if KERNEL == 1:
        return seen
    else:
        return tl.where(m < M, tl.maximum(seen, tl.max(a, 0)), NOTHING)


@triton.jit
def is_sudden(a, seen, top, KERNEL: tl.constexpr):
    """Whether the tile is far. Who sees no key of a feature reads none of it, at whatever shift."""
    if KERNEL == 1:
        return False
    else:
        far = tl.max(tl.where(top == seen, 0.0, top - seen), 0) > FAR
        if far:
            low = lows(a, seen)
            gap = tl.where(low == NOTHING, 0.0, top[None, :] - low)
            far = tl.max(tl.max(gap, 1), 0) > FAR
        return far


@triton.jit
def moved(S, Z, before, after, KERNEL: tl.constexpr):
    """A state from shift to shift"""
    less = factor(before, after, KERNEL)
    return S * less[:, None], Z * less


@triton.jit
def within(b, m, M: tl.constexpr):
    """b (BN, BM), -inf beyond M"""
    return tl.where((m < M)[None, :], b, NOTHING)


@triton.jit
def pairs(
    f, e, b, a, norm, m, far, M: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Σ_m e^(b_im + a_jm - norm_i) of all i and j, (BN, BN), by features f and e, or one by one"""
    if far:
        p = far_pairs(within(b, m, M), a, norm, BN)
    else:
        p = dot(f, tl.trans(e), PRECISION)
    return p


@triton.jit
def give(
    y, total, r, num, den, lse, o, o_n, at, n, m0, KERNEL: tl.constexpr, M: tl.constexpr,
    BM: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Numerators y (BN, BV) and denominators (BN,) at shift r on top of what the features before m0
    came to: kept for the next ones, or o and lse."""
    if m0 > 0:
        before = tl.load(lse + at, mask=at < n, other=0.0)
        new = tl.maximum(before, r)
        less, before = factor(r, new, KERNEL), factor(before, new, KERNEL)
        y = y * less[:, None] + tile(num, DV, at, n, 0, DV, BV) * before[:, None]
        total = total * less + tl.load(den + at, mask=at < n, other=0.0) * before
        r = new
    if m0 + BM < M:
        put(num, DV, at, n, 0, y, DV, BV)
        tl.store(den + at, total, mask=at < n)
        tl.store(lse + at, r, mask=at < n)
    else:
        none = total == 0
        y *= tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))[:, None]
        put(o, o_n, at, n, 0, y, DV, BV)
        whole = finite(r) + tl.log(tl.where(none, 1.0, total))
        tl.store(lse + at, tl.where(none, float("inf"), whole), mask=at < n)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def performer_walk(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, w, mask,
    s, z, s_bh, z_bh, t_seg, c, c_bh, c_seg, num, den, o, o_b, o_h, o_n, lse, N, H, segment,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a segment, ε = 0; num (B·H, N, Dv) and den (B·H, N) wait for the next features."""
    bh, part = tl.program_id(0), tl.program_id(1)
    i, t = bh.to(tl.int64), part.to(tl.int64) * t_seg
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    o, num, den, lse = head(o, bh, H, o_b, o_h), num + i * N * DV, den + i * N, lse + i * N
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s, z, c = s + i * s_bh + t, z + i * z_bh + t, c + i * c_bh + part * c_seg
    first = part * segment
    for m0 in range(0, M, BM):
        tl.debug_barrier()  # what waits was written by other threads of this program
        m = m0 + tl.arange(0, BM)
        W = weights(w, m, D, M, BD, EXACT)
        S, Z = tile(s, DV, m, M, 0, DV, BV), vector(z, m, M, 0.0)
        seen = vector(c, m, M, NOTHING)
        for start in range(first, tl.minimum(first + segment, N), BN):
            at = start + tl.arange(0, BN)
            a = exponents(k, k_n, W, mask, at, N, KERNEL, D, BD, EXACT)
            top = raised(seen, a, m, KERNEL, M)
            far = is_sudden(a, seen, top, KERNEL)
            b, _ = projected(q, q_n, W, at, N, D, BD, EXACT)
            r, shift = tl.zeros((BN,), tl.float32), top
            if KERNEL == 0:
                r = tl.max(b + top[None, :], 1)
                if far:
                    r = tl.max(within(b, m, M) + lows(a, seen), 1)
                shift = tl.where(far, seen, top)
                S, Z = moved(S, Z, seen, shift, KERNEL)
            f, e = query_features(b, shift, finite(r), KERNEL), key_features(a, top, KERNEL)
            y, total = dot(f, S, PRECISION), tl.sum(f * Z[None, :], 1)
            p = pairs(f, e, b, a, finite(r), m, far, M, BN, PRECISION)
            if far:
                S, Z = moved(S, Z, shift, top, KERNEL)
            x = tile(v, v_n, at, N, 0, DV, BV)
            S += dot(tl.trans(e), x, PRECISION, "b")
            Z += tl.sum(e, 0)
            p, x = hide(p, x, at[:, None] >= at[None, :], True)
            y += dot(p, x, PRECISION, "b")
            total += tl.sum(p, 1)
            seen = top
            give(
                y, total, r, num, den, lse, o, o_n, at, N, m0, KERNEL, M, BM, DV, BV
            )  # fmt: skip
