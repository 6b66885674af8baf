"""What forward and backward of `gated_linear` share: decays within a tile, states of the segments.

S, g and the symbols: tab/ops/gated_linear.py.

Every exponent is a sum over the tokens between two, formed as such and never as a difference of two
longer sums: it would lose digits behind a strong decay, and be NaN behind one of −∞.
"""

import math
from itertools import pairwise

import torch
import triton
import triton.language as tl
from triton import cdiv

from . import _segments
from ._launch import launch, processors, strided
from ._tiles import dot, head, put, tile

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def stretch(ends, bh, H, N):
    """Of batch entry b = bh // H: its first token, by the strides of tokens; the same among the
    tokens of all entries; how many those are; how many are its own. In a packed batch of N tokens b
    is a sequence, ends (S + 1,) says where it lies, and strides from entry to entry are 0."""
    b = bh // H
    if ends is not None:
        first = tl.load(ends + b).to(tl.int64)
        return first, first, N, (tl.load(ends + b + 1).to(tl.int64) - first).to(tl.int32)
    else:
        return 0, b.to(tl.int64) * N, tl.num_programs(0) // H * N, N


@triton.jit
def first_tile(ends, bh, H, row, tokens, N, BN: tl.constexpr):
    """Where the tiles of a program begin among those of all, of which each entry has ⌈N/BN⌉, and at
    most ⌈tokens/BN⌉ + S all sequences of a packed batch."""
    if ends is not None:
        room = tl.cdiv(tokens, BN) + tl.num_programs(0) // H
        return (bh % H).to(tl.int64) * room + row // BN + bh // H
    else:
        return bh.to(tl.int64) * tl.cdiv(N, BN)


@triton.jit
def numbers(x, ends, bh, H, row, tokens, N):
    """Of x (B, H, N) the first token of this head; `row` and `tokens` as `stretch` gives them."""
    if ends is not None:
        return x + (bh % H).to(tl.int64) * tokens + row
    else:
        return x + bh.to(tl.int64) * N


@triton.jit
def inverse(den):
    """1/den, 0 where den is 0."""
    return tl.where(den == 0, 0.0, 1.0 / tl.where(den == 0, 1.0, den))


@triton.jit
def vector(z, d, D):
    """z[d] of z (D,), 0 beyond."""
    return tl.load(z + d, mask=d < D, other=0.0)


@triton.jit
def begin(
    t, tz, at, d, D: tl.constexpr, v0, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """S and z of the state `at` those given: rows d, BV columns from v0; 0 where none is given."""
    S, Z = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32)
    if t is not None:
        S += tile(t + at * D * DV, DV, d, D, v0, DV, BV)
    if tz is not None:
        Z += vector(tz + at * D, d, D)
    return S, Z


@triton.jit
def leave(
    s, z, at, d, D: tl.constexpr, v0, S, Z, DV: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """The reverse of `begin`, where they are asked for."""
    if s is not None:
        put(s + at * D * DV, DV, d, D, v0, S, DV, BV)
    if z is not None:
        tl.store(z + at * D + d, Z, mask=(d < D) & (v0 == 0))


@triton.jit
def log_decay(g, g_n, mask, at, N):
    """Where to read the tokens `at`, and their g: those that the key mask (N,) hides from past the
    end, where there are zeros; they decay nothing."""
    if mask is not None:
        at = tl.where(tl.load(mask + at, mask=at < N, other=0) != 0, at, N)
    return at, tl.load(g + at.to(tl.int64) * g_n, mask=at < N, other=0.0)


@triton.jit
def decays(g, g_n, mask, i, N, BN: tl.constexpr):
    """Of the tokens i of a tile, each (BN,): where to read them; their g; the g of the next ones, 0
    behind the tile; Σ_{t≤i} g_t, from before the tile until token i has been; Σ_{t>j} g_t, from
    token j to its end; and Σ g_t, of all."""
    at, x = log_decay(g, g_n, mask, i, N)
    _, later = log_decay(g, g_n, mask, i + 1, N)
    later = tl.where(tl.arange(0, BN) < BN - 1, later, 0.0)
    return at, x, later, tl.cumsum(x, 0), tl.cumsum(later, 0, reverse=True), tl.sum(x, 0)


@triton.jit
def between(later, BN: tl.constexpr):
    """e^(Σ_{j<t≤i} g_t) of token i (rows) and j ≤ i; 1 where j > i."""
    i = tl.arange(0, BN)
    x = tl.where(i[:, None] > i[None, :], later[None, :], 0.0)
    return tl.exp(tl.cumsum(x, 1, reverse=True))


@triton.jit
def gated_states(
    k, k_b, k_h, k_n, v, v_b, v_h, v_n, g, g_b, g_h, g_n, mask, t, tz, logs, N, H, segment,
    D: tl.constexpr, DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a segment S, from its last tile to its first, z, where it is asked for, and Σ g: t (B·H,
    segments, D, Dv), tz (B·H, segments, D), logs (B·H, segments)."""
    bh, part = tl.program_id(0), tl.program_id(1)
    d0, v0 = tl.program_id(2) // tl.cdiv(DV, BV) * BD, tl.program_id(2) % tl.cdiv(DV, BV) * BV
    k, v, g = head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h), head(g, bh, H, g_b, g_h)
    if mask is not None:
        mask += (bh // H).to(tl.int64) * N
    s, z, first = tl.zeros((BD, BV), tl.float32), tl.zeros((BD,), tl.float32), part * segment
    behind = 0.0
    tiles = tl.cdiv(tl.minimum(segment, N - first), BN)
    for turn in range(0, tiles):
        i = first + (tiles - 1 - turn) * BN + tl.arange(0, BN)
        at, _, _, _, after, total = decays(g, g_n, mask, i, N, BN)
        c = tile(k, k_n, at, N, d0, D, BD) * tl.exp(after + behind)[:, None]
        s += dot(tl.trans(c), tile(v, v_n, at, N, v0, DV, BV), PRECISION, "b")
        if tz is not None:
            z += tl.sum(c, 0)
        behind += total
    here, d = bh.to(tl.int64) * tl.num_programs(1) + part, d0 + tl.arange(0, BD)
    leave(t, tz, here, d, D, v0, s, z, DV, BV)
    if tl.program_id(2) == 0:
        tl.store(logs + here, behind)


@triton.jit
def gated_scan(
    t, logs, s0, s, segments, REVERSE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """t becomes the state before each segment, or after it; s (B·H, D·Dv) that after the last, or
    before the first."""
    bh = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
    if s0 is not None:
        state += tl.load(s0 + bh * SIZE + at, mask=at < SIZE, other=0.0)
    for i in range(segments):
        part = bh * segments + (segments - 1 - i if REVERSE else i)
        here = t + part * SIZE + at
        own = tl.load(here, mask=at < SIZE, other=0.0)
        tl.store(here, state, mask=at < SIZE)
        state = tl.exp(tl.load(logs + part)) * state + own
    tl.store(s + bh * SIZE + at, state, mask=at < SIZE)


# --- launcher -------------------------------------------------------------------------------------


def together(k, ends: list[int], pieces: int) -> bool:
    """Whether the sequences of a packed batch, which end there, are one launch, a program for each
    of their heads: as `segments` has it."""
    enough = 2 * (len(ends) - 1) * k.shape[1] * pieces >= 3 * processors(k.device)
    return enough or max(b - a for a, b in pairwise(ends)) <= _segments.SEGMENT


def each_sequence(count: int, *tensors) -> list:
    """A packed batch (1, …) as so many sequences see it: `strided`, with 0 from one to the next."""
    return strided(*(x.expand(count, *x.shape[1:]) for x in tensors))


def segments(k, pieces: int) -> tuple[int, int]:
    """(tokens in a segment, segments) for programs that walk over the tokens of a head in so many
    pieces of its state: one where there are as many programs as fill a GPU, for then nothing is
    read twice. Not measured yet."""
    b, h, n, _ = k.shape
    size = n if 2 * b * h * pieces >= 3 * processors(k.device) else _segments.SEGMENT
    return size, cdiv(n, size)


def seen(k, v, g, mask, s0, z0, size: int, count: int, normalize: bool):
    """-> the states before each segment, t (B·H, segments, D, Dv) and tz (B·H, segments, D), the
    sums of their log decays, and S and z after the last; launches two kernels, or three."""
    b, h, n, d = k.shape
    dv, m = v.shape[-1], _segments.meta(k, v)
    t = k.new_empty(b * h, count, d, dv, dtype=torch.float32)
    tz = t.new_empty(b * h, count, d) if normalize else None
    logs = t.new_empty(b * h, count)
    grid = b * h, count, cdiv(d, m["BD"]) * cdiv(dv, m["BV"])
    launch(gated_states, grid, *strided(k, v, g), mask, t, tz, logs, n, h, size, **m)
    s = scan(t, logs, s0, (b, h, d, dv))
    return t, tz, logs, s, None if tz is None else scan(tz, logs, z0, (b, h, d))


def scan(t, logs, first, sizes: tuple[int, ...], reverse: bool = False):
    """The last state (B, H, D, Dv), and in t those that the segments see."""
    (bh, count), size, width = logs.shape, math.prod(sizes[2:]), _segments.SCAN
    s = t.new_empty(sizes)
    launch(
        gated_scan, (bh, cdiv(size, width)), t, logs, first, s, count, REVERSE=reverse, SIZE=size,
        BLOCK=width,
    )  # fmt: skip
    return s
