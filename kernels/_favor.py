"""What the Triton kernels of `performer` share: features of a tile and sums over pairs of tokens.

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

from ._common import dot, tile

FAR = tl.constexpr(60.0)
NOTHING = tl.constexpr(float("-inf"))

# --- exponents and features -----------------------------------------------------------------------


@triton.jit
def exponential(x):
    """e^x, here only: one place to tune."""
    return tl.exp(x)


@triton.jit
def finite(shift):
    """The shift of nothing, -inf, as 0"""
    return tl.where(shift == NOTHING, 0.0, shift)


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
        return tl.where(a > 0, a, 0.0)
    else:
        return exponential(a - finite(top)[None, :])


@triton.jit
def query_features(b, top, norm, KERNEL: tl.constexpr):
    """φ(q)·e^-norm; a feature at top = -inf is not read"""
    if KERNEL == 1:
        return tl.where(b > 0, b, 0.0) * exponential(-norm)[:, None]
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
            low = tl.maximum(seen[None, :], tl.associative_scan(a, 0, _larger))
        return top, low


@triton.jit
def is_far(top, low, KERNEL: tl.constexpr):
    if KERNEL == 1:
        return False
    else:
        gap = tl.where(top[None, :] == NOTHING, 0.0, finite(top)[None, :] - low)
        return tl.max(tl.max(gap, 1), 0) > FAR


@triton.jit
def row(x, i, BN: tl.constexpr):
    """x[i] of x (BN, BM)"""
    return tl.max(tl.where((tl.arange(0, BN) == i)[:, None], x, NOTHING), 0)


@triton.jit
def pairs(
    b, a, top, norm, keep, far, KERNEL: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):
    """P_ij = Σ_m e^(b_im + a_jm - norm_i) where keep_ij, else 0: (BN, BN)"""
    p = tl.zeros((BN, BN), tl.float32)
    if far:
        for j in range(BN):
            e = tl.sum(exponential(b + row(a, j, BN)[None, :] - norm[:, None]), 1)
            p = tl.where((tl.arange(0, BN) == j)[None, :], e[:, None], p)
    else:
        f = key_features(a, top, KERNEL)
        p = dot(query_features(b, top, norm, KERNEL), tl.trans(f), PRECISION)
    return tl.where(keep, p, 0.0)


@triton.jit
def pull_queries(
    g, b, a, top, norm, far, KERNEL: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):
    """db = Σ_j g_ij ∂P_ij/∂b, (BN, BM); g_ij is 0 where j > i."""
    x, at = tl.zeros(b.shape, tl.float32), tl.arange(0, BN)
    if far:
        for j in range(BN):
            g_j = tl.sum(tl.where((at == j)[None, :], g, 0.0), 1)
            e = b + row(a, j, BN)[None, :] - norm[:, None]
            x += g_j[:, None] * exponential(tl.where((at >= j)[:, None], e, NOTHING))
    else:
        x = dot(g, key_features(a, top, KERNEL), PRECISION)
        x *= query_slope(b, query_features(b, top, norm, KERNEL), norm, KERNEL)
    return x


@triton.jit
def pull_keys(
    g, b, a, top, norm, far, KERNEL: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):
    """da = Σ_i g_ij ∂P_ij/∂a, likewise"""
    x, at = tl.zeros(a.shape, tl.float32), tl.arange(0, BN)
    if far:
        for i in range(BN):
            g_i = tl.sum(tl.where((at == i)[:, None], g, 0.0), 0)
            e = a + (row(b, i, BN) - tl.max(tl.where(at == i, norm, NOTHING), 0))[None, :]
            x += g_i[:, None] * exponential(tl.where((at <= i)[:, None], e, NOTHING))
    else:
        x = dot(tl.trans(g), query_features(b, top, norm, KERNEL), PRECISION)
        x *= key_slope(a, key_features(a, top, KERNEL), KERNEL)
    return x
