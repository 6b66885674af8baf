"""tab::gated_linear_fwd for CUDA in Triton (formula and symbols: tab/ops/gated_linear.py).

    o_i = scale·(e^(G_i) Sᵀq_i + Σ_{j≤i} e^(G_i−G_j) q_i·k_j v_j)
    S'  = e^(G) S + Σ_j e^(G−G_j) k_j v_jᵀ

for the tokens of a tile, S the state before it and S' behind it, G_i = Σ_{t≤i} g_t from its first
token on, G that of its last (how the differences are summed: _gated.py). Dao and Gu 2024, listing
1; Yang et al. 2024, §4. Where o is normalized, it is divided by the same of ones in place of v and
z in place of S.

A program takes S through the tiles of a segment, all its rows and some columns of it. Where there
are heads enough to fill the GPU, or few tokens, a segment is the sequence: one launch. Otherwise

    states   S of every segment, in parallel
    scan     S before each segment
    walk     o of every segment

Every order of summation is fixed, nothing is atomic: the same input gives the same bits.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._heads import groups_forward

from . import _segments
from ._gated import (
    begin,
    between,
    decays,
    each_sequence,
    inverse,
    leave,
    numbers,
    seen,
    segments,
    stretch,
    together,
)
from ._launch import (
    HOPPER,
    block,
    capability,
    launch,
    mask_bytes,
    meta_heads,
    meta_tensor,
    outside,
    precision,
    register,
    register_packed,
    rows,
    strided,
    token_major_empty,
    whole,
)
from ._tiles import dot, head, hide, put, tile

MAX_SIZE = {"bf16": 256, "tf32": 256, "tf32x3": 128}  # D and Dv

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def gated_walk(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, mask, ends, t, s,
    o, o_b, o_h, o_n, tz, z, den, N, H, segment, scale,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o of a segment, BV of its columns. t (B·H, segments, D, Dv), or None where all start from 0;
    s (B·H, D, Dv), where there is one segment: the state behind it. tz and z: the same of z; den
    (B, H, N): the denominators, where o is normalized. ends: of a packed batch."""
    bh, part, v0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    at, row, tokens, N = stretch(ends, bh, H, N)
    q, k = head(q, bh, H, q_b, q_h) + at * q_n, head(k, bh, H, k_b, k_h) + at * k_n
    v, g = head(v, bh, H, v_b, v_h) + at * v_n, head(g, bh, H, g_b, g_h) + at * g_n
    o, d = head(o, bh, H, o_b, o_h) + at * o_n, tl.arange(0, BD)
    if mask is not None:
        mask += row
    if den is not None:
        den = numbers(den, ends, bh, H, row, tokens, N)
    here = bh.to(tl.int64) * tl.num_programs(1) + part
    S, Z = begin(t, tz, here, d, D, v0, DV, BD, BV)
    first = part * segment
    for start in range(first, tl.minimum(first + segment, N), BN):
        i = start + tl.arange(0, BN)
        j, _, later, until, after, total = decays(g, g_n, mask, i, N, BN)
        x, c = tile(q, q_n, i, N, 0, D, BD), tile(k, k_n, j, N, 0, D, BD)  # (BN, BD)
        y = tile(v, v_n, j, N, v0, DV, BV)  # (BN, BV)
        p = dot(x, tl.trans(c), PRECISION, "ab") * between(later, BN)
        p, shown = hide(p, y, i[:, None] >= i[None, :], True)
        w = dot(x, S, PRECISION, "a") * tl.exp(until)[:, None] + dot(p, shown, PRECISION, "b")
        c *= tl.exp(after)[:, None]
        if den is not None:
            sums = tl.sum(x * Z[None, :], 1) * tl.exp(until) + tl.sum(p, 1)
            tl.store(den + i, sums, mask=(i < N) & (v0 == 0))
            w *= inverse(sums)[:, None]
            Z = Z * tl.exp(total) + tl.sum(c, 0)
        put(o, o_n, i, N, v0, w * scale, DV, BV)
        S = S * tl.exp(total) + dot(tl.trans(c), y, PRECISION, "b")
    leave(s, z, bh.to(tl.int64), d, D, v0, S, Z, DV, BV)


# --- launcher -------------------------------------------------------------------------------------


def takes(q, k, v, *_) -> str | None:
    sizes = {"D": q.shape[-1], "Dv": v.shape[-1]}
    return _segments.takes(q, k, v) or outside(q, MAX_SIZE[precision(q)], **sizes)


def meta(q, v, backward: bool = False) -> dict:
    """The compile-time arguments. BD and BV: the rows or columns of a state that one program holds,
    with all of its columns or rows; the launcher says which. As long as registers hold them."""
    m = _segments.meta(q, v)
    if m["PRECISION"] == "bf16" and max(q.shape[-1], v.shape[-1]) <= 64:
        m["BN"] = 64 >> (capability(q.device) < HOPPER) >> backward
    else:
        m |= {"BN": 16, "BD": min(m["BD"], 32), "BV": min(m["BV"], 32), "num_warps": 8}
    return m


def walk(q, k, v, log_decay, key_mask, s0, z0, scale: float, state: bool, normalize: bool):
    """-> o, S, z and the denominators; S and z may be None without `state`, the last two are where
    it does not normalize."""
    q, k, v, mask = rows(q), rows(k), rows(v), mask_bytes(key_mask)
    s0, z0 = whole(s0, z0)
    b, h, n, d = q.shape
    dv, o, m = v.shape[-1], token_major_empty(q, v.shape[-1]), meta(q, v)
    den = q.new_empty(b, h, n, dtype=torch.float32) if normalize else None
    pieces, last = cdiv(dv, m["BV"]), (None, None)
    size, count = segments(q, pieces)
    if count == 1:
        t, tz = s0, z0
        s = q.new_empty(b, h, d, dv, dtype=torch.float32) if state else None
        z = s.new_empty(b, h, d) if state and normalize else None
        last = s, z
    else:
        t, tz, _, s, z = seen(k, v, log_decay, mask, s0, z0, size, count, normalize)
    m["BD"] = block(d, 256)
    launch(
        gated_walk, (b * h, count, pieces), *strided(q, k, v, log_decay), mask, None, t, last[0],
        *strided(o), tz, last[1], den, n, h, size, scale, **m,
    )  # fmt: skip
    return o, s, z, den


@groups_forward
def forward(q, k, v, log_decay, key_mask, s0, scale):
    """tab::gated_linear_fwd"""
    return walk(q, k, v, log_decay, key_mask, s0, None, scale, True, False)[:2]


@groups_forward
def _stateless(q, k, v, log_decay, key_mask, s0, scale):
    return walk(q, k, v, log_decay, key_mask, s0, None, scale, False, False)[:1]


def stateless(*args):
    """tab::gated_linear_stateless_fwd"""
    return _stateless(*args)[0]


def packed_walk(ends, q, k, v, log_decay, key_mask, s0, z0, cu_seqlens, scale, normalize: bool):
    """The same of sequences that end there, in one launch, or None where they are better taken one
    length after the other."""
    h, d, dv, count = q.shape[1], q.shape[-1], v.shape[-1], len(ends) - 1
    m = meta(*longest(ends, q, v))
    pieces = cdiv(dv, m["BV"])
    if h != k.shape[1] or takes(q, k, v) or not together(k, ends, pieces):
        return None
    q, k, v, o = rows(q), rows(k), rows(v), token_major_empty(q, dv)
    s0, z0, cu_seqlens = whole(s0, z0, cu_seqlens)
    s, z, den = q.new_empty(count, h, d, dv, dtype=torch.float32), None, None
    if normalize:
        z, den = s.new_empty(count, h, d), s.new_empty(1, h, q.shape[2])
    m["BD"] = block(d, 256)
    launch(
        gated_walk, (count * h, 1, pieces), *each_sequence(count, q, k, v, log_decay),
        mask_bytes(key_mask), cu_seqlens, s0, s, *each_sequence(count, o), z0, z, den, q.shape[2],
        h, q.shape[2], scale, **m,
    )  # fmt: skip
    return o, s, z, den


def packed(ends, q, k, v, log_decay, key_mask, s0, cu_seqlens, scale):
    """tab::gated_linear_packed_fwd"""
    given = q, k, v, log_decay, key_mask, s0, None, cu_seqlens, scale
    found = packed_walk(ends, *given, False)
    return found and found[:2]


def longest(ends: list[int], *tensors):
    """Views of so many tokens: few are multiplied otherwise."""
    return (x[:, :, : max(b - a for a, b in pairwise(ends))] for x in tensors)


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    both = torch.float32, torch.bfloat16
    for b, h, n, d, types in (
        (512, 4, 64, 64, both),  # one launch
        (1, 8, 8192, 64, both),  # by segments
        (1, 8, 8192, 128, (torch.float32,)),  # the widest, in pieces
        (1, 8, 8192, 256, (torch.float16, torch.bfloat16)),
    ):
        for dtype in types:
            q, g = meta_heads(b, h, n, d, dtype), meta_heads(b, h, n, 1, torch.float32)
            mask = meta_tensor(b, n, dtype=torch.bool)
            yield q, q, q, g, mask, meta_tensor(b, h, d, d), 0.1


def stateless_cases():
    """One launch."""
    for *x, _, scale in list(cases())[:2]:
        yield *x, None, scale


def packed_cases():
    """Sequences of 64 tokens."""
    for q, k, v, g, mask, s0, scale in list(cases())[:2]:
        q, k, v, g = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (q, k, v, g))
        ends = meta_tensor(len(mask) + 1, dtype=torch.int32)
        yield q, k, v, g, mask.view(1, -1), s0, ends, scale


register("gated_linear_fwd", forward, takes=takes, cases=cases)
register("gated_linear_stateless_fwd", stateless, takes=takes, cases=stateless_cases)
register_packed("gated_linear_packed_fwd", packed, cases=packed_cases)
