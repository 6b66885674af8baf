"""Local and sparse attention of few tokens: one program holds all of a head's.

Blocks of a pattern would be programs of 16 rows and more, most of them padding; here all N ≤ 64
tokens are one masked tile. Each operand is read once, forward and backward are a launch each, and
the backward needs no Δ in memory. Formulas: _softmax.py, _softmax_backward.py.
"""

import torch
import triton
import triton.language as tl

from ._launch import HOPPER, block, capability, launch, strided
from ._softmax import LOG2E, biased, capped, finish, forward_tile, quiet, real_keys, turned
from ._softmax_backward import row_sums, steepness
from ._tiles import dot, head, put, sound, tile

FEW = 64  # tokens

# --- who sees whom --------------------------------------------------------------------------------


@triton.jit
def visible(i, j, left, right, cols, N, GRID: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether the query at place i sees key j of N, as in tab.ops.local; i and j broadcast."""
    if GRID:
        down, across = j // cols - i // cols, j % cols - i % cols
        seen = (down >= -left) & (down <= right) & (across >= -left) & (across <= right)
    else:
        seen = (j - i >= -left) & (j - i <= right)
    if CAUSAL:
        seen = seen & (j <= i)
    return seen & (j < N)


@triton.jit
def listed(ptr, col, h, nb, b, lists, i, j, N, CAUSAL: tl.constexpr):
    """The same for queries i (m,) and keys j (n,) of head h, as in tab.ops.sparse -> (m, n). The
    blocks of a row are the bits of a number: at most 64 of them."""
    row = tl.where(lists > nb, h, 0) * (nb + 1) + i // b
    first = tl.load(ptr + row, mask=i < N, other=0)
    end = tl.load(ptr + row + 1, mask=i < N, other=0)
    blocks = tl.zeros(i.shape, tl.int64)
    for e in tl.range(0, tl.max(end - first, 0), num_stages=1):
        inside = first + e < end
        c = tl.load(col + first + e, mask=inside, other=0).to(tl.int64)
        blocks = blocks | (inside.to(tl.int64) << c)
    seen = ((blocks[:, None] >> (j // b)[None, :].to(tl.int64)) & 1) != 0
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return seen & (j < N)[None, :]


@triton.jit
def pairs(
    ptr, col, h, nb, b, lists, left, right, cols, i, j, N, GRID: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """By the pattern, or where there is none by the window."""
    if ptr is not None:
        return listed(ptr, col, h, nb, b, lists, i, j, N, CAUSAL)
    else:
        return visible(i[:, None], j[None, :], left, right, cols, N, GRID, CAUSAL)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def few_forward(
    q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n, lse, mask, slopes,
    ptr, col, nb, b, lists, left, right, cols, N, H, scale, cap,
    GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and lse of a head."""
    bh = tl.program_id(0)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    i, j = tl.arange(0, BN), tl.arange(0, BN)
    seen = pairs(ptr, col, bh % H, nb, b, lists, left, right, cols, i, j, N, GRID, CAUSAL)
    if mask is not None:
        real, j = real_keys(mask, bh // H, j, N)
        seen = seen & real[None, :]
    if slopes is not None:
        slopes += bh % H
    at = quiet(mask, bh // H, q, q_n, i, N, N, N, D, BD)
    y, top, total = forward_tile(
        tl.zeros((BN, BV), tl.float32), tl.full((BN,), float("-inf"), tl.float32),
        tl.zeros((BN,), tl.float32), tile(q, q_n, at, N, 0, D, BD), q, q_n, at, N, k, k_n, v, v_n,
        j, N, 0, seen, scale, cap, slopes, 0, True, D, DV, BD, BV, PRECISION,
    )  # fmt: skip
    y, top = finish(y, top, total)
    put(head(o, bh, H, o_b, o_h), o_n, i, N, 0, y, DV, BV)
    tl.store(lse + bh.to(tl.int64) * N + i, top, mask=i < N)


@triton.jit
def few_backward(
    do, g_b, g_h, g_n, q, q_b, q_h, q_n, k, k_b, k_h, k_n, v, v_b, v_h, v_n, o, o_b, o_h, o_n,
    dq, dq_b, dq_h, dq_n, dk, dk_b, dk_h, dk_n, dv, dv_b, dv_h, dv_n, lse, mask, slopes,
    ptr, col, nb, b, lists, left, right, cols, N, H, scale, cap,
    GRID: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a head. Rows that are not finite are left out of the products and marked for
    those who see them, as `sound` says."""
    wide: tl.constexpr = "tf32" if PRECISION == "fp16" else PRECISION  # dS can overflow float16
    bh = tl.program_id(0)
    q, k, v = head(q, bh, H, q_b, q_h), head(k, bh, H, k_b, k_h), head(v, bh, H, v_b, v_h)
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    i, j = tl.arange(0, BN), tl.arange(0, BN)
    seen = pairs(ptr, col, bh % H, nb, b, lists, left, right, cols, i, j, N, GRID, CAUSAL)
    real = None
    if mask is not None:
        real, j = real_keys(mask, bh // H, j, N)
        seen = seen & real[None, :]
    if slopes is not None:
        slopes += bh % H
    at = quiet(mask, bh // H, q, q_n, i, N, N, N, D, BD)
    delta = row_sums(do, g_n, o, o_n, i, N, DV, BV)
    top = tl.load(lse + bh.to(tl.int64) * N + i, mask=i < N, other=float("inf"))
    x, y = tile(q, q_n, at, N, 0, D, BD), tile(k, k_n, j, N, 0, D, BD)
    s = capped(dot(x, turned(y, PRECISION), PRECISION), scale, cap)
    if cap is not None:
        steep = steepness(s, cap)
    s = biased(s, i[:, None], j[None, :], slopes) - (top * LOG2E)[:, None]
    p = tl.exp2(tl.where(seen, s, float("-inf")))
    g, z = tile(do, g_n, at, N, 0, DV, BV), tile(v, v_n, j, N, 0, DV, BV)
    ds = p * (dot(g, turned(z, PRECISION), PRECISION) - delta[:, None])
    if cap is not None:
        ds *= steep
    at_k, mark = sound(k, k_n, j, N, 0, D, BD)
    shown = tl.where(seen, ds + mark[None, :], 0.0)
    x = dot(shown, tile(k, k_n, at_k, N, 0, D, BD), wide, "b") * scale
    put(head(dq, bh, H, dq_b, dq_h), dq_n, i, N, 0, x, D, BD)
    at_q, mark = sound(q, q_n, at, N, 0, D, BD)
    at_g, mark_g = sound(do, g_n, at, N, 0, DV, BV)
    mark, seen = mark + mark_g, seen & (at < N)[:, None]
    shown = tl.where(seen, p + mark[:, None], 0.0)
    w = dot(tl.trans(shown), tile(do, g_n, at_g, N, 0, DV, BV), PRECISION, "b")
    shown = tl.where(seen, ds + mark[:, None], 0.0)
    y = dot(tl.trans(shown), tile(q, q_n, at_q, N, 0, D, BD), wide, "b") * scale
    j = tl.arange(0, BN)
    if mask is not None:
        w, y = tl.where(real[:, None], w, 0.0), tl.where(real[:, None], y, 0.0)
    put(head(dv, bh, H, dv_b, dv_h), dv_n, j, N, 0, w, DV, BV)
    put(head(dk, bh, H, dk_b, dk_h), dk_n, j, N, 0, y, D, BD)


# --- launching ------------------------------------------------------------------------------------


def one_tile(q, k, v, m: dict) -> dict | None:
    """Of a launcher's compile-time arguments those of these kernels, or None where they do not take
    a head."""
    n, d, dv = q.shape[2], q.shape[-1], v.shape[-1]
    if q.dtype == torch.float32 and capability(q.device) != HOPPER:  # too few registers for tf32x3
        return None
    if n > FEW or k.shape[1:3] != q.shape[1:3] or d > m["BD"] or dv > m["BV"]:
        return None
    bn, names = block(n, FEW), ("CAUSAL", "D", "DV", "BD", "BV", "PRECISION")
    warps = bn // 16 * (1 if max(d, dv) <= 64 and q.dtype != torch.float32 else 2)
    return {name: m[name] for name in names} | {
        "GRID": m.get("GRID", False), "BN": bn, "num_warps": warps, "num_stages": 1,
    }  # fmt: skip


def forward(q, k, v, o, lse, told, seen, scales, m):
    """told: key_mask and slopes. seen: `by_pattern` or `by_window`."""
    b, h, n, _ = q.shape
    launch(few_forward, (b * h,), *strided(q, k, v, o), lse, *told, *seen, n, h, *scales, **m)


def backward(do, q, k, v, o, dq, dk, dv, lse, told, seen, scales, m):
    b, h, n, _ = q.shape
    operands = strided(do, q, k, v, o, dq, dk, dv)
    plain = m["PRECISION"] == "bf16" and all(x is None for x in (*told, scales[1]))
    if plain and m["num_warps"] == 4 and capability(q.device) == HOPPER:
        m["maxnreg"] = 168  # 176: then two programs would fill a processor, not three
    launch(few_backward, (b * h,), *operands, lse, *told, *seen, n, h, *scales, **m)


def by_pattern(ptr, col, block_size: int):
    lists = ptr.shape[0] * (ptr.shape[1] - 1)
    return ptr, col, ptr.shape[1] - 1, block_size, lists, 0, 0, 0


def by_window(left: int, right: int, cols: int):
    return None, None, 1, 1, 1, left, right, cols
