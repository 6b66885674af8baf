"""The parts of the Triton kernels of `performer`: features of a tile, pairs of tokens, the forward.

Formula and symbols: tab/ops/performer.py. a (keys) and b (queries) are exponents, `top` is the
shift c of a tile's features. Nothing here is stored: features exist on chip only.

Causal pairs inside one tile know a fact that a product of two feature tiles does not: a shift taken
over the tile may come from a key later than the query. The product is still right when the shift
exceeds what every query may know by at most FAR, since e^±FAR is in float32's range with room to
spare. Else (far), for extreme or masked keys, the exponents are added up pair by pair. Only a tile
that meets itself can be far.
"""

import triton
import triton.language as tl

from ._tiles import dot, finite, hide, put, tile

FAR = tl.constexpr(60.0)
NOTHING = tl.constexpr(float("-inf"))

# --- exponents and features -----------------------------------------------------------------------


@triton.jit
def exponential(x):
    """e^x, here only: one place to tune."""
    return tl.exp(x)


@triton.jit
def vector(ptr, at, n, fill):
    return tl.load(ptr + at, mask=at < n, other=fill)


@triton.jit
def project(
    x, stride, w, at, n, m0, D: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """W x̂ (BN, BM) and ‖x̂‖²/2 (BN,) of tokens `at`; w (M, D)"""
    m = m0 + tl.arange(0, BM)
    y = tl.zeros((BN, BM), tl.float32)
    norm = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        part = tile(x, stride, at, n, d0, D, BD)
        y += dot(part, tl.trans(tile(w, D, m, M, d0, D, BD)), EXACT)
        norm += tl.sum(part * part, 1)
    return y * D**-0.25, norm * (0.5 * D**-0.5)


@triton.jit
def key_exponents(
    k, stride, w, mask, at, n, m0, KERNEL: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """a (BN, BM); -inf, which either kernel maps to 0, outside and where the mask (N,) is 0."""
    a, norm = project(k, stride, w, at, n, m0, D, M, BN, BM, BD, EXACT)
    if KERNEL == 0:
        a -= norm[:, None]
    inside = (at < n)[:, None] & (m0 + tl.arange(0, BM) < M)[None, :]
    if mask is not None:
        inside = inside & (tl.load(mask + at, mask=at < n, other=0) != 0)[:, None]
    return tl.where(inside, a, NOTHING)


@triton.jit
def key_features(a, top, KERNEL: tl.constexpr):
    """φ(k)"""
    if KERNEL == 1:
        return tl.where(a < 0, 0.0, a)  # NaN stays
    else:
        return exponential(a - finite(top)[None, :])


@triton.jit
def query_features(b, top, norm, KERNEL: tl.constexpr):
    """φ(q)·e^-norm; a feature at top = -inf is not read"""
    if KERNEL == 1:
        return tl.where(b < 0, 0.0, b) * exponential(-norm)[:, None]
    else:
        return exponential(b + top[None, :] - norm[:, None])


@triton.jit
def key_slope(a, phi, KERNEL: tl.constexpr):
    """dφ(k)/da"""
    return tl.where(a > 0, 1.0, 0.0) if KERNEL == 1 else phi


@triton.jit
def query_slope(b, phi, norm, KERNEL: tl.constexpr):
    """dφ(q)/db·e^-norm"""
    return tl.where(b > 0, 1.0, 0.0) * exponential(-norm)[:, None] if KERNEL == 1 else phi


@triton.jit
def factor(before, after, KERNEL: tl.constexpr):
    """What moves a state from shift `before` to `after`"""
    if KERNEL == 1:
        return tl.full(after.shape, 1.0, tl.float32)
    else:
        return exponential(before - finite(after))


# --- pairs of tokens, causal ----------------------------------------------------------------------


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def shifts(a, seen, diagonal, KERNEL: tl.constexpr):
    """The shift of a tile of keys (BM,), and what each query of it may know of it (BN, BM);
    `seen` (BM,) is known to all."""
    if KERNEL == 1:
        return seen, tl.zeros(a.shape, tl.float32)
    else:
        top = tl.maximum(seen, tl.max(a, 0))
        low = tl.zeros(a.shape, tl.float32) + top[None, :]
        if diagonal:
            low = lows(a, seen)
        return top, low


@triton.jit
def lows(a, seen):
    """Of the shift of a tile that meets itself, what each query may know"""
    return tl.maximum(seen[None, :], tl.associative_scan(a, 0, _larger))


@triton.jit
def is_far(top, low, KERNEL: tl.constexpr):
    if KERNEL == 1:
        return False
    else:
        gap = tl.where(top[None, :] == NOTHING, 0.0, finite(top)[None, :] - low)
        return tl.max(tl.max(gap, 1), 0) > FAR


@triton.jit
def row(x, i, BN: tl.constexpr):
    """x[i] of x (BN, BM). A sum, for a maximum passes over NaN."""
    return tl.sum(tl.where((tl.arange(0, BN) == i)[:, None], x, 0.0), 0)


@triton.jit
def pairs(
    b, a, top, norm, keep, far, KERNEL: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):
    """P_ij = Σ_m e^(b_im + a_jm - norm_i) where keep_ij, else 0: (BN, BN)"""
    if far:
        p = far_pairs(b, a, norm, BN)
    else:
        f = key_features(a, top, KERNEL)
        p = dot(query_features(b, top, norm, KERNEL), tl.trans(f), PRECISION)
    return tl.where(keep, p, 0.0)


@triton.jit
def far_pairs(b, a, norm, BN: tl.constexpr):
    """The same of all pairs, one by one."""
    p = tl.zeros((BN, BN), tl.float32)
    for j in range(BN):
        e = tl.sum(exponential(b + row(a, j, BN)[None, :] - norm[:, None]), 1)
        p = tl.where((tl.arange(0, BN) == j)[None, :], e[:, None], p)
    return p


# --- forward, a tile at a time --------------------------------------------------------------------


@triton.jit
def state(
    k, k_n, v, v_n, w, mask, first, last, N, s0, z0, c0, s, z, c, m0, v0,
    KERNEL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM features and BV columns of S (M, Dv), z and c (M,) over tokens [first, last), on top of
    s0, z0 and c0 if given."""
    m = m0 + tl.arange(0, BM)
    S = tl.zeros((BM, BV), tl.float32)
    Z = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), 0.0 if KERNEL == 1 else NOTHING, tl.float32)
    if s0 is not None:
        S += tile(s0, DV, m, M, v0, DV, BV)
        Z += vector(z0, m, M, 0.0)
        top = vector(c0, m, M, NOTHING)
    for start in range(first, last, BN):
        at = start + tl.arange(0, BN)
        a = key_exponents(k, k_n, w, mask, at, N, m0, KERNEL, D, M, BN, BM, BD, EXACT)
        if KERNEL == 0:
            new = tl.maximum(top, tl.max(a, 0))
            less = factor(top, new, KERNEL)
            S *= less[:, None]
            Z *= less
            top = new
        f = key_features(a, top, KERNEL)  # (BN, BM)
        S += dot(tl.trans(f), tile(v, v_n, at, N, v0, DV, BV), PRECISION, "b")
        Z += tl.sum(f, 0)
    put(s, DV, m, M, v0, S, DV, BV)
    if v0 == 0:
        tl.store(z + m, Z, mask=m < M)
        tl.store(c + m, top, mask=m < M)


@triton.jit
def output(
    q, q_n, k, k_n, v, v_n, w, mask, s, z, c, o, o_n, lse, start, first, N, eps, v0,
    KERNEL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of o of the tile of tokens at start, whose segment begins at `first`."""
    at = start + tl.arange(0, BN)
    num = tl.zeros((BN, BV), tl.float32)
    den = tl.zeros((BN,), tl.float32)
    r = tl.full((BN,), 0.0 if KERNEL == 1 else NOTHING, tl.float32)
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        b, _ = project(q, q_n, w, at, N, m0, D, M, BN, BM, BD, EXACT)
        seen = vector(c, m, M, NOTHING)
        if KERNEL == 0:
            new = tl.maximum(r, tl.max(b + seen[None, :], 1))
            less = factor(r, new, KERNEL)
            num *= less[:, None]
            den *= less
            r = new
        f = query_features(b, seen, finite(r), KERNEL)  # (BN, BM)
        num += dot(f, tile(s, DV, m, M, v0, DV, BV), PRECISION)
        den += tl.sum(f * vector(z, m, M, 0.0)[None, :], 1)
        if CAUSAL:
            for j0 in range(first, start + BN, BN):
                j = j0 + tl.arange(0, BN)
                a = key_exponents(k, k_n, w, mask, j, N, m0, KERNEL, D, M, BN, BM, BD, EXACT)
                top, low = shifts(a, seen, j0 == start, KERNEL)
                if KERNEL == 0:
                    new = tl.maximum(r, tl.max(b + low, 1))
                    less = factor(r, new, KERNEL)
                    num *= less[:, None]
                    den *= less
                    r = new
                keep, far = at[:, None] >= j[None, :], is_far(top, low, KERNEL)
                p = pairs(b, a, top, finite(r), keep, far, KERNEL, BN, PRECISION)  # (BN, BN)
                den += tl.sum(p, 1)
                y = tile(v, v_n, j, N, v0, DV, BV)
                if j0 == start:
                    p, y = hide(p, y, keep, True)
                    num += dot(p, y, PRECISION, "b")
                else:
                    num += dot(p, y, PRECISION, "b")
                seen = top
    den += eps
    none = den == 0
    num *= tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, den))[:, None]
    put(o, o_n, at, N, v0, num, DV, BV)
    if v0 == 0:
        whole = finite(r) + tl.log(tl.where(none, 1.0, den))
        tl.store(lse + at, tl.where(none, float("inf"), whole), mask=at < N)
