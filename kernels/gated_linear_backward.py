"""tab::gated_linear_bwd for CUDA in Triton. With G and S of a tile as in gated_linear.py, E_ij =
scale·e^(G_i−G_j), and dS the gradient of the state behind it:

    dq_i = a_i + Σ_{j≤i} E_ij do_i·v_j k_j,  a_i = scale·e^(G_i) S do_i
    dk_j = b_j + Σ_{i≥j} E_ij do_i·v_j q_i,  b_j = e^(G−G_j) dS v_j
    dv_j = e^(G−G_j) dSᵀk_j + Σ_{i≥j} E_ij q_i·k_j do_i
    dg_t = Σ_{i≥t} q_i·a_i + Σ_{j<t} k_j·b_j + e^(G) Σ S∘dS + Σ_{j<t≤i} E_ij do_i·v_j q_i·k_j

dg_t gathers the pairs j < t ≤ i. Summing q·dq − k·dk from t on would be shorter: what both have of
later pairs cancels, and with it the digits of what is left.

    states, scan   S before each segment, as in the forward; not where the sequence is one
    pull           dq, S before each tile, and dS of each segment, from its first tile on
    scan           dS behind each segment
    push           dk, dv and dg, from its last tile on

Where S is too much for the registers of one program, each holds some of its rows and all columns;
then dv, which sums over rows, takes a launch of its own with all rows and some columns.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import answered
from tab.ops._heads import groups_backward

from . import gated_linear
from ._gated import (
    between,
    decays,
    each_sequence,
    first_tile,
    scan,
    seen,
    segments,
    stretch,
    together,
)
from ._launch import (
    block,
    launch,
    mask_bytes,
    register,
    register_packed,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._tiles import dot, head, hide, put, tile
from .gated_linear import longest, meta, takes

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def gated_pull(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, do, o_b, o_h, o_n,
    mask, ends, t, dt, kept, dq, dq_b, dq_h, dq_n, reads, N, H, segment, scale,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment, BD of its columns, and as many rows of dS, dt (B·H, segments, D, Dv), where
    there is more than one segment; kept (tiles of all, D, Dv): S before the tiles; reads (pieces,
    H, tokens of all): of dg the first sum, within a tile. t and ends as in gated_walk."""
    bh, part, d0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    at, row, tokens, N = stretch(ends, bh, H, N)
    q, k = head(q, bh, H, q_b, q_h) + at * q_n, head(k, bh, H, k_b, k_h) + at * k_n
    v, g = head(v, bh, H, v_b, v_h) + at * v_n, head(g, bh, H, g_b, g_h) + at * g_n
    do, dq = head(do, bh, H, o_b, o_h) + at * o_n, head(dq, bh, H, dq_b, dq_h) + at * dq_n
    d, first = d0 + tl.arange(0, BD), part * segment
    kept += (first_tile(ends, bh, H, row, tokens, N, BN) + first // BN) * D * DV
    reads += (tl.program_id(2) * H + bh % H).to(tl.int64) * tokens + row
    if mask is not None:
        mask += row
    here = (bh.to(tl.int64) * tl.num_programs(1) + part) * D * DV
    S, dS = tl.zeros((BD, BV), tl.float32), tl.zeros((BD, BV), tl.float32)
    before = 0.0
    if t is not None:
        S += tile(t + here, DV, d, D, 0, DV, BV)
    for start in range(first, tl.minimum(first + segment, N), BN):
        i = start + tl.arange(0, BN)
        j, _, later, until, after, total = decays(g, g_n, mask, i, N, BN)
        put(kept, DV, d, D, 0, S, DV, BV)
        kept += D * DV
        x, c = tile(q, q_n, i, N, d0, D, BD), tile(k, k_n, j, N, d0, D, BD)  # (BN, BD)
        y, z = tile(v, v_n, j, N, 0, DV, BV), tile(do, o_n, i, N, 0, DV, BV)  # (BN, BV)
        w = dot(z, tl.trans(S), PRECISION, "a") * (tl.exp(until) * scale)[:, None]
        tl.store(reads + i, tl.cumsum(tl.sum(x * w, 1), 0, reverse=True), mask=i < N)
        p = dot(z, tl.trans(y), PRECISION, "ab") * (between(later, BN) * scale)
        if dt is not None:
            f = x * (tl.exp(before + until) * scale)[:, None]
            dS += dot(tl.trans(f), z, PRECISION, "b")
            before += total
        S = S * tl.exp(total) + dot(tl.trans(c * tl.exp(after)[:, None]), y, PRECISION, "b")
        p, shown = hide(p, c, i[:, None] >= i[None, :], True)
        put(dq, dq_n, i, N, d0, w + dot(p, shown, PRECISION, "b"), D, BD)
    if dt is not None:
        put(dt + here, DV, d, D, 0, dS, DV, BV)


@triton.jit
def gated_push(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, do, o_b, o_h, o_n,
    mask, ends, t, kept, dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, reads, dg, ds0,
    N, H, segment, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """KEYS: dk of a segment, BD of its columns, and their share of dg (pieces, tokens of all, H);
    then BV is all of Dv. VALUES: dv, BV of its columns; then BD is all of D. t (B·H, segments, D,
    Dv): dS behind the segments, or None where it is 0; ds0, where there is one segment: dS before
    it."""
    bh, part, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d0, v0 = piece * BD if KEYS else 0, 0 if KEYS else piece * BV
    at, row, tokens, N = stretch(ends, bh, H, N)
    q, k = head(q, bh, H, q_b, q_h) + at * q_n, head(k, bh, H, k_b, k_h) + at * k_n
    v, g = head(v, bh, H, v_b, v_h) + at * v_n, head(g, bh, H, g_b, g_h) + at * g_n
    do, dk = head(do, bh, H, o_b, o_h) + at * o_n, head(dk, bh, H, dk_b, dk_h) + at * dk_n
    dv, first = head(dv, bh, H, dv_b, dv_h) + at * dv_n, part * segment
    d = d0 + tl.arange(0, BD)
    reads += (piece * H + bh % H).to(tl.int64) * tokens + row
    dg += (piece.to(tl.int64) * tokens + row) * H + bh % H
    if mask is not None:
        mask += row
    dS, tiles = tl.zeros((BD, BV), tl.float32), tl.cdiv(tl.minimum(segment, N - first), BN)
    if t is not None:
        dS += tile(t + (bh.to(tl.int64) * tl.num_programs(1) + part) * D * DV, DV, d, D, v0, DV, BV)
    kept += (first_tile(ends, bh, H, row, tokens, N, BN) + first // BN + tiles) * D * DV
    for turn in range(0, tiles):
        i = first + (tiles - 1 - turn) * BN + tl.arange(0, BN)
        j, own, _, until, after, total = decays(g, g_n, mask, i, N, BN)
        x, c = tile(q, q_n, i, N, d0, D, BD), tile(k, k_n, j, N, d0, D, BD)  # (BN, BD)
        z = tile(do, o_n, i, N, v0, DV, BV)  # (BN, BV)
        sees, later = i[:, None] <= i[None, :], i[:, None] < i[None, :]  # row: key
        e = tl.exp(tl.cumsum(tl.where(later, own[None, :], 0.0), 1)) * scale
        p = dot(c, tl.trans(x), PRECISION, "ab") * e
        end = tl.exp(after)[:, None]
        if VALUES:
            y, shown = hide(p, z, sees, True)
            y = dot(c, dS, PRECISION, "a") * end + dot(y, shown, PRECISION, "b")
            if mask is not None:
                y = tl.where((j < N)[:, None], y, 0.0)
            put(dv, dv_n, i, N, v0, y, DV, BV)
        if KEYS:
            y = tile(v, v_n, j, N, 0, DV, BV)
            w = dot(y, tl.trans(dS), PRECISION, "a") * end
            kept -= D * DV
            dp = dot(y, tl.trans(z), PRECISION, "ab")
            # Row j: Σ_{i≥t} of its pairs, and what comes from behind the tile.
            gather = tl.cumsum(tl.where(later, p * dp, 0.0), 1, reverse=True)
            gather = tl.where(later, gather + tl.sum(c * w, 1)[:, None], 0.0)
            r = tl.load(reads + i, mask=i < N, other=0.0) + tl.sum(gather, 0)
            r += tl.exp(total) * tl.sum(tile(kept, DV, d, D, 0, DV, BV) * dS)
            dp, shown = hide(dp * e, x, sees, True)
            w += dot(dp, shown, PRECISION, "b")
            if mask is not None:
                w, r = tl.where((j < N)[:, None], w, 0.0), tl.where(j < N, r, 0.0)
            put(dk, dk_n, i, N, d0, w, D, BD)
            tl.store(dg + i.to(tl.int64) * H, r, mask=i < N)
        x *= (tl.exp(until) * scale)[:, None]
        dS = dS * tl.exp(total) + dot(tl.trans(x), z, PRECISION, "b")
    if ds0 is not None:
        put(ds0 + bh.to(tl.int64) * D * DV, DV, d, D, v0, dS, DV, BV)


# --- launcher -------------------------------------------------------------------------------------


@partial(groups_backward, states=1)
def backward(do, ds, q, k, v, log_decay, key_mask, s0, scale, state=True):
    """tab::gated_linear_bwd; dS₀ may be None without `state`."""
    (q,) = answered(key_mask, do, q)
    do, q, k, v, mask = rows(do), rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, ds = whole(s0, ds)
    b, h, n, d = q.shape
    dim_v, m = v.shape[-1], meta(q, v, backward=True)
    columns, m["BV"] = m["BV"], block(dim_v, 256)
    pieces = cdiv(d, m["BD"])
    size, count = segments(q, pieces)
    given, sizes = strided(q, k, v, log_decay, do), (b, h, d, dim_v)
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    dg = q.new_empty(pieces, b, n, h, dtype=torch.float32)
    reads = torch.empty_like(dg)
    kept = dg.new_empty(b * h, cdiv(n, m["BN"]), d, dim_v, dtype=_held(q))
    if count == 1:
        t, dt, logs = s0, None, None
    else:
        t, logs, _ = seen(k, v, log_decay, mask, s0, size, count)
        dt = torch.empty_like(t)
    launch(
        gated_pull, (b * h, count, pieces), *given, mask, None, t, dt, kept, *strided(dq), reads,
        n, h, size, scale, **m,
    )  # fmt: skip
    if count == 1:
        dt, ds0 = ds, dg.new_empty(sizes) if state else None
    else:
        ds0 = scan(dt, logs, ds, sizes, True)
    last = ds0 if count == 1 else None
    given = *given, mask, None, dt, kept, *strided(dk, dv), reads, dg
    dg = push((b * h, count), given, last, (n, h, size, scale), dg, columns, m)
    return dq, dk, dv, dg, ds0


def push(grid, given, ds0, sizes, dg, columns: int, m: dict):
    """dk, dv and dS₀, in place, and dg (B, H, N, 1), of pieces that are added up here."""
    pieces = len(dg)
    launch(gated_push, (*grid, pieces), *given, ds0, *sizes, KEYS=True, VALUES=pieces == 1, **m)
    if pieces > 1:
        m |= {"BD": block(m["D"], 256), "BV": columns}
        grid = *grid, cdiv(m["DV"], columns)
        launch(gated_push, grid, *given, None, *sizes, KEYS=False, VALUES=True, **m)
    dg = dg[0] if pieces == 1 else dg.sum(0)
    return dg.transpose(1, 2)[..., None]


def packed(ends, q, k, v, log_decay, key_mask, s0, o, s, do, ds, cu_seqlens, scale):
    """tab::gated_linear_packed_bwd of sequences that end there, or None as in the forward."""
    (_, h, tokens, d), dim_v, count = q.shape, v.shape[-1], len(ends) - 1
    m = meta(*longest(ends, q, v), backward=True)
    columns, m["BV"] = m["BV"], block(dim_v, 256)
    pieces = cdiv(d, m["BD"])
    if h != k.shape[1] or takes(q, k, v) or not together(k, ends, pieces):
        return None
    do = torch.zeros_like(o) if do is None else do
    (q,) = answered(key_mask, do, q)
    do, q, k, v, mask = rows(do), rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, ds, cu_seqlens = whole(s0, ds, cu_seqlens)
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    dg = q.new_empty(pieces, 1, tokens, h, dtype=torch.float32)
    reads = torch.empty_like(dg)
    tiles = h * (cdiv(tokens, m["BN"]) + count)
    kept = dg.new_empty(tiles, d, dim_v, dtype=_held(q))
    given = *each_sequence(count, q, k, v, log_decay, do), mask, cu_seqlens
    sizes = tokens, h, tokens, scale
    launch(
        gated_pull, (count * h, 1, pieces), *given, s0, None, kept, *each_sequence(count, dq),
        reads, *sizes, **m,
    )  # fmt: skip
    ds0 = None if s0 is None else torch.empty_like(s0)
    given = *given, ds, kept, *each_sequence(count, dk, dv), reads, dg
    dg = push((count * h, 1), given, ds0, sizes, dg, columns, m)
    return dq, dk, dv, dg, q.new_empty(0) if ds0 is None else ds0


def stateless(do, ds, q, k, *rest):
    """tab::gated_linear_stateless_bwd"""
    shared = q.shape[1] != k.shape[1]  # then each head of q has a share of dS₀, too
    return backward(do, ds, q, k, *rest, shared)[:4]


def _held(q) -> torch.dtype:
    """Of the states that push reads for dg alone: float16 is too narrow for them."""
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for q, k, v, g, mask, s0, scale in gated_linear.cases():
        yield v, s0, q, k, v, g, mask, s0, scale


def stateless_cases():
    for q, k, v, *rest in gated_linear.stateless_cases():
        yield v, None, q, k, v, *rest


def packed_cases():
    for q, k, v, g, mask, s0, ends, scale in gated_linear.packed_cases():
        yield q, k, v, g, mask, s0, v, s0, v, s0, ends, scale


register("gated_linear_bwd", backward, takes=lambda do, ds, *x: takes(*x), cases=cases)
register(
    "gated_linear_stateless_bwd", stateless, takes=lambda do, ds, *x: takes(*x),
    cases=stateless_cases,
)  # fmt: skip
register_packed("gated_linear_packed_bwd", packed, cases=packed_cases)
