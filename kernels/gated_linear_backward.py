"""tab::gated_linear_bwd for CUDA in Triton (formula: _gated_backward.py).

    states, scan   S before each segment, as in the forward; not where the sequence is one
    pull           dq, S before each tile, and dS of each segment, from its first tile on
    scan           dS behind each segment
    push           dk, dv and dg, from its last tile on

Where S is too much for the registers of one program, each holds some of its rows and all columns;
then dv, which sums over rows, takes a launch of its own with all rows and some columns.
"""

from functools import partial

import torch
from triton import cdiv

from tab.ops._check import answered
from tab.ops._heads import groups_backward

from . import gated_linear
from ._gated import each_sequence, scan, seen, segments, together
from ._gated_backward import gated_pull, gated_push
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
from .gated_linear import longest, meta, takes

# --- launcher -------------------------------------------------------------------------------------


def walk(do, ds, dz, q, k, v, log_decay, o, den, key_mask, s0, z0, scale: float, state: bool):
    """-> dq, dk, dv, dg, dS₀ and dz₀, which may both be None without `state`; o and den where o is
    normalized."""
    q, o, den = answered_queries(key_mask, do, q, o, den)
    do, q, k, v, mask = rows(do), rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, z0, ds, dz = whole(s0, z0, ds, dz)
    b, h, n, d = q.shape
    dim_v, m = v.shape[-1], meta(q, v, backward=True)
    columns, m["BV"] = m["BV"], block(dim_v, 256)
    pieces = cdiv(d, m["BD"])
    size, count = segments(q, pieces)
    given = strided(q, k, v, log_decay, do)
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    dg = q.new_empty(pieces, b, n, h, dtype=torch.float32)
    reads = torch.empty_like(dg)
    kept, kept_z = _kept(b * h * cdiv(n, m["BN"]), d, dim_v, q, den)
    low = None if den is None else torch.empty_like(den)
    if count == 1:
        t, tz, dt, dtz, logs = s0, z0, None, None, None
    else:
        t, tz, logs, *_ = seen(k, v, log_decay, mask, s0, z0, size, count, den is not None)
        dt, dtz = torch.empty_like(t), None if tz is None else torch.empty_like(tz)
    launch(
        gated_pull, (b * h, count, pieces), *given, *_strided(o), mask, None, t, dt, kept,
        *strided(dq), reads, den, low, tz, dtz, kept_z, n, h, size, scale, **m,
    )  # fmt: skip
    first, last = [None, None], [None, None]
    if count == 1:
        dt, dtz = ds, dz
        if state:
            first[0] = dg.new_empty(b, h, d, dim_v)
            first[1] = None if den is None else dg.new_empty(b, h, d)
            last = first
    else:
        first[0] = scan(dt, logs, ds, (b, h, d, dim_v), True)
        first[1] = None if dtz is None else scan(dtz, logs, dz, (b, h, d), True)
    given = *given, mask, None, dt, kept, *strided(dk, dv), reads, dg, den, low, dtz, kept_z
    dg = push((b * h, count), given, last, (n, h, size, scale), dg, columns, m)
    return dq, dk, dv, dg, *first


@partial(groups_backward, states=1)
def backward(do, ds, q, k, v, log_decay, key_mask, s0, scale, state=True):
    """tab::gated_linear_bwd; dS₀ may be None without `state`."""
    given = q, k, v, log_decay, None, None, key_mask, s0, None
    return walk(do, ds, None, *given, scale, state)[:5]


def push(grid, given, first, sizes, dg, columns: int, m: dict):
    """dk, dv, dS₀ and dz₀, in place, and dg (B, H, N, 1), of pieces that are added up here."""
    pieces = len(dg)
    launch(gated_push, (*grid, pieces), *given, *first, *sizes, KEYS=True, VALUES=pieces == 1, **m)
    if pieces > 1:
        m |= {"BD": block(m["D"], 256), "BV": columns}
        grid = *grid, cdiv(m["DV"], columns)
        launch(gated_push, grid, *given, None, None, *sizes, KEYS=False, VALUES=True, **m)
    dg = dg[0] if pieces == 1 else dg.sum(0)
    return dg.transpose(1, 2)[..., None]


def packed_walk(
    ends, q, k, v, log_decay, o, den, key_mask, s0, z0, do, ds, dz, cu_seqlens, scale: float
):
    """The same of sequences that end there, or None as in the forward."""
    (_, h, tokens, d), dim_v, count = q.shape, v.shape[-1], len(ends) - 1
    m = meta(*longest(ends, q, v), backward=True)
    columns, m["BV"] = m["BV"], block(dim_v, 256)
    pieces = cdiv(d, m["BD"])
    if h != k.shape[1] or takes(q, k, v) or not together(k, ends, pieces):
        return None
    q, o, den = answered_queries(key_mask, do, q, o, den)
    do, q, k, v, mask = rows(do), rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, z0, ds, dz, cu_seqlens = whole(s0, z0, ds, dz, cu_seqlens)
    dq, dk, dv = token_major_empty(q), token_major_empty(k), token_major_empty(v)
    dg = q.new_empty(pieces, 1, tokens, h, dtype=torch.float32)
    reads, low = torch.empty_like(dg), None if den is None else torch.empty_like(den)
    kept, kept_z = _kept(h * (cdiv(tokens, m["BN"]) + count), d, dim_v, q, den)
    given, sizes = each_sequence(count, q, k, v, log_decay, do), (tokens, h, tokens, scale)
    seen_o = [None] * 4 if o is None else each_sequence(count, o)
    launch(
        gated_pull, (count * h, 1, pieces), *given, *seen_o, mask, cu_seqlens, s0, None, kept,
        *each_sequence(count, dq), reads, den, low, z0, None, kept_z, *sizes, **m,
    )  # fmt: skip
    first = [None if x is None else torch.empty_like(x) for x in (s0, z0)]
    given = *given, mask, cu_seqlens, ds, kept, *each_sequence(count, dk, dv), reads, dg
    given = *given, den, low, dz, kept_z
    dg = push((count * h, 1), given, first, sizes, dg, columns, m)
    return dq, dk, dv, dg, *(q.new_empty(0) if x is None else x for x in first)


def packed(ends, q, k, v, log_decay, key_mask, s0, o, s, do, ds, cu_seqlens, scale):
    """tab::gated_linear_packed_bwd"""
    do = torch.zeros_like(o) if do is None else do
    given = q, k, v, log_decay, None, None, key_mask, s0, None, do, ds, None, cu_seqlens, scale
    found = packed_walk(ends, *given)
    return found and found[:5]


def answered_queries(key_mask, do, q, o, den):
    """As `answered`; o and den where there are such."""
    if o is None:
        return *answered(key_mask, do, q), None, None
    q, o, den = answered(key_mask, do, q, o, den[..., None])
    return q, rows(o), den[..., 0].contiguous()


def _strided(o) -> list:
    return [None] * 4 if o is None else strided(o)


def _kept(tiles: int, d: int, dv: int, q, den) -> tuple:
    """Of the states before the tiles, which push reads for dg alone: float16 is too narrow."""
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    s = q.new_empty(tiles, d, dv, dtype=dtype)
    return s, None if den is None else q.new_empty(tiles, d, dtype=torch.float32)


def stateless(do, ds, q, k, *rest):
    """tab::gated_linear_stateless_bwd"""
    shared = q.shape[1] != k.shape[1]  # then each head of q has a share of dS₀, too
    return backward(do, ds, q, k, *rest, shared)[:4]


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
