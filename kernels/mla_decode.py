"""tab::mla_decode for CUDA in Triton (formula and symbols: tab/ops/mla_decode.py).

    q̃_h = W_uk,hᵀ q_n,h,  S_h = (q̃_h·c + q_r,h·k_r)·scale,  z_h = softmax(S_h) c,  o_h = W_uv,h z_h

q̃ and o are batched matrix products, PyTorch's. Between them:

    split   a block of heads over a part of one sequence: rows of heads share each tile of latents,
            which serves as keys and as values; 16 heads at least, fewer are padded
    combine z = Σ_s z_s·exp(lse_s − lse) over the parts; empty parts are not read

A sequence is divided by its own length, read on the device: ragged lengths stay balanced and
nothing synchronises. One tile serves both products where it fits on chip: bfloat16, R up to 512.
Elsewhere the scores go over R in chunks, and above 512 programs share out the columns of z. The
order of every sum is fixed by shapes and lengths: same input, same bits.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from ._launch import (
    HOPPER,
    block,
    capability,
    launch,
    meta_tensor,
    outside,
    precision,
    processors,
    register,
    rows,
    strided,
)
from ._softmax import LOG2E, finish, fold, merge
from ._tiles import dot, put, tile
from .mla import MAX_ROTARY

WHOLE = 512  # largest rank whose z one program holds
CHUNK = 32  # of R, for the scores where a tile does not serve whole
PART = 256  # tokens below which a sequence is not divided further
COLUMNS = 256  # of z in one program of combine

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def mla_decode_split(
    q, q_b, q_h, qr, qr_b, qr_h, cache, c_b, c_n, seqlens, z, z_s, z_b, z_h, lse, Nmax, H, scale,
    DR: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z of one part, BH heads and BV columns; lse (parts, B, H), −inf where the part is empty."""
    chunks: tl.constexpr = (R + BV - 1) // BV
    whole: tl.constexpr = R <= BR and BR == BV
    # Programs that read the same latents are neighbours: those run at once, and share them in L2.
    each = tl.cdiv(H, BH) * chunks
    b, part, piece = (
        (tl.program_id(0) // each).to(tl.int64),
        tl.program_id(1),
        tl.program_id(0) % each,
    )
    h, v0 = piece // chunks * BH + tl.arange(0, BH), piece % chunks * BV
    q, qr, cache = q + b * q_b, qr + b * qr_b, cache + b * c_b
    n = tl.minimum(tl.load(seqlens + b), Nmax).to(tl.int32)
    size = tl.cdiv(tl.cdiv(n, tl.num_programs(1)), BN) * BN
    first = part * size
    rotary = tile(qr, qr_h, h, H, 0, DR, BP)  # (BH, BP)
    if whole:
        latent = tile(q, q_h, h, H, 0, R, BR)  # (BH, BR)
    top = tl.full((BH,), float("-inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    out = tl.zeros((BH, BV), tl.float32)
    for start in range(first, tl.minimum(first + size, n), BN):
        j = start + tl.arange(0, BN)
        c = tile(cache, c_n, j, n, v0, R, BV)  # (BN, BV); rows past the length are never read
        if whole:
            s = dot(latent, tl.trans(c), PRECISION, "b")  # (BH, BN)
        else:
            s = tl.zeros((BH, BN), tl.float32)
            for r0 in range(0, R, BR):
                x = tile(q, q_h, h, H, r0, R, BR)
                s += dot(x, tl.trans(tile(cache, c_n, j, n, r0, R, BR)), PRECISION, "b")
        if DR > 0:
            s += dot(rotary, tl.trans(tile(cache + R, c_n, j, n, 0, DR, BP)), PRECISION, "b")
        s = tl.where((j < n)[None, :], s * (scale * LOG2E), float("-inf"))
        p, out, top, total = merge(out, top, total, s)
        out += dot(p, c, PRECISION, "b")
    out, log = finish(out, top, total)
    if v0 == 0:
        at = (part.to(tl.int64) * (tl.num_programs(0) // each) + b) * H + h
        tl.store(lse + at, log, mask=h < H)
    if n > first or tl.num_programs(1) == 1:
        put(z + part.to(tl.int64) * z_s + b * z_b, z_h, h, H, v0, out, R, BV)


@triton.jit
def mla_decode_combine(
    parts_z, parts_lse, z, z_b, z_h, lse, parts, H, R: tl.constexpr, BLOCK: tl.constexpr
):
    """z (B, H, R) and lse (B, H) of one (b, h) from parts_z (parts, B, H, R), float32."""
    bh, BH = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    v0, row = tl.program_id(1) * BLOCK, tl.arange(0, 1)
    out = tl.zeros((1, BLOCK), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for part in range(parts):
        at = part * BH + bh + row
        log = tl.load(parts_lse + at)
        filled = (log != float("-inf")).to(tl.int32)  # rows of this part that were written
        x = tile(parts_z + (part * BH + bh) * R, R, row, filled, v0, R, BLOCK)
        out, top, total = fold(out, top, total, x, log)
    out, log = finish(out, top, total)
    if v0 == 0:
        tl.store(lse + bh + row, log)
    put(z + bh // H * z_b + bh % H * z_h, 0, row, 1, v0, out, R, BLOCK)


# --- launcher -------------------------------------------------------------------------------------


def takes(q_nope, q_rope, *_) -> str | None:
    return outside(q_nope, MAX_ROTARY, Dr=q_rope.shape[-1])


def meta(h: int, r: int, dr: int, how: str, arch: int) -> dict:
    """The compile-time arguments of `split`. Not measured: what fits on chip without spills. Each
    product of Hopper reads its heads from shared memory again: twice the tokens, half the reads."""
    columns = block(r, WHOLE if r <= WHOLE else WHOLE // 2)
    many = 64 if columns <= 256 or arch == HOPPER else 32
    heads, tokens = (64, many) if how == "bf16" else (16, 32)
    return {
        "DR": dr, "R": r, "BH": block(h, heads), "BN": tokens, "BP": block(dr, MAX_ROTARY),
        "BR": columns if how == "bf16" and r <= WHOLE else min(columns, CHUNK), "BV": columns,
        "PRECISION": how, "num_warps": 8, "num_stages": 2,
    }  # fmt: skip


def decode(q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale):
    """tab::mla_decode"""
    (b, h, _), n, r = q_nope.shape, cache.shape[1], w_uk.shape[-1]
    q = torch.bmm(q_nope.transpose(0, 1), w_uk)  # (H, B, R)
    q_rope, cache, seqlens = rows(q_rope), rows(cache), seqlens.contiguous()
    m = meta(h, r, q_rope.shape[-1], precision(cache[:, None]), capability(q.device))
    programs = b * cdiv(h, m["BH"]) * cdiv(r, m["BV"])
    parts = max(1, min(2 * processors(cache.device) // programs, cdiv(n, PART)))
    z = torch.empty_like(q)  # (H, B, R)
    lse = q.new_empty(b, h, dtype=torch.float32)
    to = z, 0, r, b * r, lse
    if parts > 1:
        parts_z = q.new_empty(parts, b, h, r, dtype=torch.float32)
        parts_lse = parts_z.new_empty(parts, b, h)
        to = parts_z, b * h * r, h * r, r, parts_lse
    launch(
        mla_decode_split, (programs, parts), q, r, b * r,
        *strided(q_rope, cache), seqlens, *to, n, h, scale, **m,
    )  # fmt: skip
    if parts > 1:
        launch(
            mla_decode_combine, (b * h, cdiv(r, COLUMNS)), parts_z, parts_lse, z, r, b * r, lse,
            parts, h, R=r, BLOCK=block(r, COLUMNS),
        )  # fmt: skip
    o = q.new_empty(b, h, w_uv.shape[1])
    torch.bmm(z, w_uv.mT, out=o.transpose(0, 1))
    return o, lse


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    both, half = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    for h, r, types in ((128, 512, both), (16, 64, half), (128, 576, both)):
        for dtype in types:
            shapes = (1, h, 128), (1, h, 64), (1, 8192, r + 64), (h, 128, r), (h, 128, r)
            q, q_rope, cache, w_uk, w_uv = (meta_tensor(*shape, dtype=dtype) for shape in shapes)
            lengths = meta_tensor(1, dtype=torch.int32)
            yield q, q_rope, cache, lengths, w_uk, w_uv, 0.1


register("mla_decode", decode, takes=takes, cases=cases)
