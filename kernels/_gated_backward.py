"""The kernels of the backward pass of gated linear attention, for its launchers in
gated_linear_backward.py and gated_linear_normalized.py. With G and S of a tile as in
gated_linear.py, E_ij = scale·e^(G_i−G_j), and dS the gradient of the state behind it:

    dq_i = a_i + Σ_{j≤i} E_ij do_i·v_j k_j,  a_i = scale·e^(G_i) S do_i
    dk_j = b_j + Σ_{i≥j} E_ij do_i·v_j q_i,  b_j = e^(G−G_j) dS v_j
    dv_j = e^(G−G_j) dSᵀk_j + Σ_{i≥j} E_ij q_i·k_j do_i
    dg_t = Σ_{i≥t} q_i·a_i + Σ_{j<t} k_j·b_j + e^(G) Σ S∘dS + Σ_{j<t≤i} E_ij do_i·v_j q_i·k_j

dg_t gathers the pairs j < t ≤ i. Summing q·dq − k·dk from t on would be shorter: what both have of
later pairs cancels, and with it the digits of what is left.

Where o is normalized, it is as though v had a column of ones and S that of z, and do were do/den
with the column −do·o/den.
"""

import triton
import triton.language as tl

from ._gated import (
    begin,
    between,
    decays,
    first_tile,
    inverse,
    leave,
    numbers,
    stretch,
    vector,
)
from ._tiles import dot, head, hide, put, tile


@triton.jit
def of_head(den, low, ends, bh, H, row, tokens, N):
    """The first token of this head, of both."""
    den = numbers(den, ends, bh, H, row, tokens, N)
    return den, numbers(low, ends, bh, H, row, tokens, N)


@triton.jit
def divided(den, low, i, N):
    """1/den and −do·o/den of the tokens i."""
    inv = inverse(tl.load(den + i, mask=i < N, other=0.0))
    return inv, tl.load(low + i, mask=i < N, other=0.0)


@triton.jit
def real(mask, x, shown):
    """x, and 0 for what the mask hides."""
    return x if mask is None else tl.where(shown, x, 0.0)


@triton.jit
def gathered(p, dp, own, later):
    """Of dg in a tile what its keys give: of key j (rows) the pairs with i ≥ t > j, and `own`, that
    with what comes behind the tile."""
    x = tl.cumsum(tl.where(later, p * dp, 0.0), 1, reverse=True)
    return tl.sum(tl.where(later, x + own[:, None], 0.0), 0)


@triton.jit
def gated_pull(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, do, o_b, o_h, o_n,
    o, p_b, p_h, p_n, mask, ends, t, dt, kept, dq, dq_b, dq_h, dq_n, reads,
    den, low, tz, dtz, kept_z, N, H, segment, scale,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment, BD of its columns, and as many rows of dS, dt (B·H, segments, D, Dv), where
    there is more than one segment; kept (tiles of all, D, Dv): S before the tiles; reads (pieces,
    H, tokens of all): of dg the first sum, within a tile. t and ends as in gated_walk. Where o is
    normalized, den is given, low (B, H, N) becomes −do·o/den, and tz, dtz (B·H, segments, D) and
    kept_z (tiles of all, D) are of z what t, dt and kept are of S."""
    bh, part, d0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    at, row, tokens, N = stretch(ends, bh, H, N)
    q, k = head(q, bh, H, q_b, q_h) + at * q_n, head(k, bh, H, k_b, k_h) + at * k_n
    v, g = head(v, bh, H, v_b, v_h) + at * v_n, head(g, bh, H, g_b, g_h) + at * g_n
    do, dq = head(do, bh, H, o_b, o_h) + at * o_n, head(dq, bh, H, dq_b, dq_h) + at * dq_n
    d, first = d0 + tl.arange(0, BD), part * segment
    tiles = first_tile(ends, bh, H, row, tokens, N, BN) + first // BN
    kept += tiles * D * DV
    if den is not None:
        o, kept_z = head(o, bh, H, p_b, p_h) + at * p_n, kept_z + tiles * D
        den, low = of_head(den, low, ends, bh, H, row, tokens, N)
    reads += (tl.program_id(2) * H + bh % H).to(tl.int64) * tokens + row
    if mask is not None:
        mask += row
    here, before = bh.to(tl.int64) * tl.num_programs(1) + part, 0.0
    S, Z = begin(t, tz, here, d, D, 0, DV, BD, BV)
    dS, dZ = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32)
    for start in range(first, tl.minimum(first + segment, N), BN):
        i = start + tl.arange(0, BN)
        j, _, later, until, after, total = decays(g, g_n, mask, i, N, BN)
        put(kept, DV, d, D, 0, S, DV, BV)
        kept += D * DV
        x, c = tile(q, q_n, i, N, d0, D, BD), tile(k, k_n, j, N, d0, D, BD)  # (BN, BD)
        y, z = tile(v, v_n, j, N, 0, DV, BV), tile(do, o_n, i, N, 0, DV, BV)  # (BN, BV)
        w, p = dot(z, tl.trans(S), PRECISION, "a"), dot(z, tl.trans(y), PRECISION, "ab")
        if den is not None:  # as if do were divided, and v and S had a column more
            inv = inverse(tl.load(den + i, mask=i < N, other=0.0))
            r = -tl.sum(z * tile(o, p_n, i, N, 0, DV, BV), 1) * inv
            tl.store(low + i, r, mask=(i < N) & (d0 == 0))
            tl.store(kept_z + d, Z, mask=d < D)
            kept_z += D
            w, p = w * inv[:, None] + r[:, None] * Z[None, :], p * inv[:, None] + r[:, None]
        w *= (tl.exp(until) * scale)[:, None]
        tl.store(reads + i, tl.cumsum(tl.sum(x * w, 1), 0, reverse=True), mask=i < N)
        p *= between(later, BN) * scale
        if dt is not None:
            f = x * (tl.exp(before + until) * scale)[:, None]
            if den is not None:
                dZ += tl.sum(f * r[:, None], 0)
                f *= inv[:, None]
            dS += dot(tl.trans(f), z, PRECISION, "b")
            before += total
        e = c * tl.exp(after)[:, None]
        S = S * tl.exp(total) + dot(tl.trans(e), y, PRECISION, "b")
        if den is not None:
            Z = Z * tl.exp(total) + tl.sum(e, 0)
        p, shown = hide(p, c, i[:, None] >= i[None, :], True)
        put(dq, dq_n, i, N, d0, w + dot(p, shown, PRECISION, "b"), D, BD)
    leave(dt, dtz, here, d, D, 0, dS, dZ, DV, BV)


@triton.jit
def gated_push(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, do, o_b, o_h, o_n,
    mask, ends, t, kept, dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, reads, dg,
    den, low, tz, kept_z, ds0, dz0, N, H, segment, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """KEYS: dk of a segment, BD of its columns, and their share of dg (pieces, tokens of all, H);
    then BV is all of Dv. VALUES: dv, BV of its columns; then BD is all of D. t (B·H, segments, D,
    Dv): dS behind the segments, or None where it is 0; ds0, where there is one segment: dS before
    it. The others are of z, and as in gated_pull."""
    bh, part, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d0, v0 = piece * BD if KEYS else 0, 0 if KEYS else piece * BV
    at, row, tokens, N = stretch(ends, bh, H, N)
    q, k = head(q, bh, H, q_b, q_h) + at * q_n, head(k, bh, H, k_b, k_h) + at * k_n
    v, g = head(v, bh, H, v_b, v_h) + at * v_n, head(g, bh, H, g_b, g_h) + at * g_n
    do, dk = head(do, bh, H, o_b, o_h) + at * o_n, head(dk, bh, H, dk_b, dk_h) + at * dk_n
    dv, first, d = head(dv, bh, H, dv_b, dv_h) + at * dv_n, part * segment, d0 + tl.arange(0, BD)
    reads += (piece * H + bh % H).to(tl.int64) * tokens + row
    dg += (piece.to(tl.int64) * tokens + row) * H + bh % H
    if mask is not None:
        mask += row
    tiles = tl.cdiv(tl.minimum(segment, N - first), BN)
    dS, dZ = begin(t, tz, bh.to(tl.int64) * tl.num_programs(1) + part, d, D, v0, DV, BD, BV)
    last = first_tile(ends, bh, H, row, tokens, N, BN) + first // BN + tiles - 1
    if den is not None:
        den, low = of_head(den, low, ends, bh, H, row, tokens, N)
    for turn in range(0, tiles):
        i = first + (tiles - 1 - turn) * BN + tl.arange(0, BN)
        j, own, _, until, after, total = decays(g, g_n, mask, i, N, BN)
        x, c = tile(q, q_n, i, N, d0, D, BD), tile(k, k_n, j, N, d0, D, BD)  # (BN, BD)
        z = tile(do, o_n, i, N, v0, DV, BV)  # (BN, BV)
        sees, later = i[:, None] <= i[None, :], i[:, None] < i[None, :]  # row: key
        e = tl.exp(tl.cumsum(tl.where(later, own[None, :], 0.0), 1)) * scale
        p = dot(c, tl.trans(x), PRECISION, "ab") * e
        if den is not None:
            inv, r = divided(den, low, i, N)
        if VALUES:
            y, shown = hide(p if den is None else p * inv[None, :], z, sees, True)
            y = dot(y, shown, PRECISION, "b") + dot(c, dS, PRECISION, "a") * tl.exp(after)[:, None]
            put(dv, dv_n, i, N, v0, real(mask, y, (j < N)[:, None]), DV, BV)
        if KEYS:
            y = tile(v, v_n, j, N, 0, DV, BV)
            w, dp = dot(y, tl.trans(dS), PRECISION, "a"), dot(y, tl.trans(z), PRECISION, "ab")
            both = tl.sum(tile(kept + (last - turn) * D * DV, DV, d, D, 0, DV, BV) * dS)
            if den is not None:
                w, dp = w + dZ[None, :], dp * inv[None, :] + r[None, :]
                both += tl.sum(vector(kept_z + (last - turn) * D, d, D) * dZ)
            w *= tl.exp(after)[:, None]
            s = tl.load(reads + i, mask=i < N, other=0.0) + tl.exp(total) * both
            s += gathered(p, dp, tl.sum(c * w, 1), later)
            dp, shown = hide(dp * e, x, sees, True)
            w += dot(dp, shown, PRECISION, "b")
            put(dk, dk_n, i, N, d0, real(mask, w, (j < N)[:, None]), D, BD)
            tl.store(dg + i.to(tl.int64) * H, real(mask, s, j < N), mask=i < N)
        x *= (tl.exp(until) * scale)[:, None]
        if den is not None:
            dZ = dZ * tl.exp(total) + tl.sum(x * r[:, None], 0)
            x *= inv[:, None]
        dS = dS * tl.exp(total) + dot(tl.trans(x), z, PRECISION, "b")
    leave(ds0, dz0, bh.to(tl.int64), d, D, v0, dS, dZ, DV, BV)
