"""tab::mla_bwd and bent_mla_bwd for CUDA in Triton. With P = exp(S − lse) computed again
(tab/ops/mla.py), and where scores are capped dS times the slope of the cap:

    Δ = Σ do·o − dlse,  dS = scale·P∘(do·vᵀ − Δ),  dq_n = dS k,  dq_r = dS k_r,
    dk = dSᵀ q_n,  dv = Pᵀ do,  dk_r = Σ_h dSᵀ q_r,
    dc = Σ_h(dk W_uk,h + dv W_uv,h),  dW_uk,h = Σ_b dkᵀ c,  dW_uv,h = Σ_b dvᵀ c

One program per (batch entry, head) and tile of keys, which it expands once; dk and dv are written
side by side, (B, N, H, Dn+Dv). dc is then one matrix product over all heads, [dW_uk dW_uv] one over
all tokens: PyTorch's, with float32 sums and no atomics. Partial sums of dc and dW for each (b, h)
would be more to write than dk and dv, unless R < (Dn + Dv)/2. With N in one tile the same program
has all of dS and writes dq too, one launch; beyond, a second one goes over tiles of queries.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from tab.ops._check import answered
from tab.ops.mla_forms import real_tokens

from . import mla
from ._launch import launch, register, rows, strided, token_major_empty, whole
from ._softmax import LOG2E
from ._tiles import dot, finite, head, hide, put, tile
from .mla import arguments, expanded, meta, scores, takes

# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def pair_gradients(
    s, steep, v, do, g_n, o, o_n, lse, dlse, i, N, scale,
    DV: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P, dS and the tile do (BN, BV) of queries i"""
    log = tl.load(lse + i, mask=i < N, other=0.0)
    p = tl.exp2(s - finite(log * LOG2E)[:, None])
    g = tile(do, g_n, i, N, 0, DV, BV)
    delta = tl.sum(g * tile(o, o_n, i, N, 0, DV, BV), 1)
    if dlse is not None:
        delta -= tl.load(dlse + i, mask=i < N, other=0.0)
    ds = p * (dot(g, tl.trans(v), PRECISION, "a") - delta[:, None]) * (scale * steep)
    return p, ds, g


@triton.jit
def mla_grad_kv(
    qn, qn_b, qn_h, qn_n, qr, qr_b, qr_h, qr_n, c, c_b, c_n, kr, kr_b, kr_n,
    uk, uk_h, uk_d, uv, uv_h, uv_d, mask, slopes, do, g_b, g_h, g_n, o, o_b, o_h, o_n, lse, dlse,
    dqn, dqn_b, dqn_h, dqn_n, dqr, dqr_b, dqr_h, dqr_n, dkv, dkr, N, H, scale, cap,
    CAUSAL: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, WITH_Q: tl.constexpr,
):  # fmt: skip
    """dk, dv and this head's dk_r of BN keys; WITH_Q, when these are all keys: dq_n and dq_r too.

    dkv (B, N, H, Dn+Dv), dkr (B, H, N, Dr) float32.
    """
    bh, start = tl.program_id(0), tl.program_id(1) * BN
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    qn, qr = head(qn, bh, H, qn_b, qn_h), head(qr, bh, H, qr_b, qr_h)
    c, kr, uk, uv = c + b * c_b, kr + b * kr_b, uk + h * uk_h, uv + h * uv_h
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    lse += bh.to(tl.int64) * N
    if dlse is not None:
        dlse += bh.to(tl.int64) * N
    if mask is not None:
        mask += b * N
    if slopes is not None:
        slopes += h
    j = start + tl.arange(0, BN)
    k = expanded(c, c_n, uk, uk_d, j, N, R, DN, BN, BK, BR, PRECISION)  # (BN, BK)
    v = expanded(c, c_n, uv, uv_d, j, N, R, DV, BN, BV, BR, PRECISION)  # (BN, BV)
    rotary = tile(kr, kr_n, j, N, 0, DR, BP)  # (BN, BP)
    dk = tl.zeros((BN, BK), tl.float32)
    dv = tl.zeros((BN, BV), tl.float32)
    drotary = tl.zeros((BN, BP), tl.float32)
    for i0 in range(start if CAUSAL else 0, N, BN):
        i = i0 + tl.arange(0, BN)
        x, y = tile(qn, qn_n, i, N, 0, DN, BK), tile(qr, qr_n, i, N, 0, DR, BP)
        s, steep = scores(
            x, y, k, rotary, i, j, mask, slopes, N, scale, cap, CAUSAL, DR, PRECISION
        )  # (BN, BN)
        p, ds, g = pair_gradients(
            s, steep, v, do, g_n, o, o_n, lse, dlse, i, N, scale, DV, BV, PRECISION
        )
        seen, hides = j[:, None] <= i[None, :], i0 == start if CAUSAL else False
        p, g = hide(tl.trans(p), g, seen, hides)
        dv += dot(p, g, PRECISION, "b")
        ds_t, x = hide(tl.trans(ds), x, seen, hides)
        dk += dot(ds_t, x, PRECISION, "b")
        if DR > 0:
            ds_t, y = hide(tl.trans(ds), y, seen, hides)
            drotary += dot(ds_t, y, PRECISION, "b")
        if WITH_Q:
            seen = i[:, None] >= j[None, :]
            ds_q, x = hide(ds, k, seen, hides)
            put(head(dqn, bh, H, dqn_b, dqn_h), dqn_n, i, N, 0, dot(ds_q, x, PRECISION), DN, BK)
            if DR > 0:
                ds_q, y = hide(ds, rotary, seen, hides)
                dy = dot(ds_q, y, PRECISION, "b")
                put(head(dqr, bh, H, dqr_b, dqr_h), dqr_n, i, N, 0, dy, DR, BP)
    stride = H * (DN + DV)
    dkv += b * N * stride + h * (DN + DV)
    put(dkv, stride, j, N, 0, dk, DN, BK)
    put(dkv + DN, stride, j, N, 0, dv, DV, BV)
    if DR > 0:
        put(dkr + bh.to(tl.int64) * N * DR, DR, j, N, 0, drotary, DR, BP)


@triton.jit
def mla_grad_q(
    qn, qn_b, qn_h, qn_n, qr, qr_b, qr_h, qr_n, c, c_b, c_n, kr, kr_b, kr_n,
    uk, uk_h, uk_d, uv, uv_h, uv_d, mask, slopes, do, g_b, g_h, g_n, o, o_b, o_h, o_n, lse, dlse,
    dqn, dqn_b, dqn_h, dqn_n, dqr, dqr_b, dqr_h, dqr_n, N, H, scale, cap,
    CAUSAL: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_n and dq_r of BN queries; keys are expanded again."""
    bh, i = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    qn, qr = head(qn, bh, H, qn_b, qn_h), head(qr, bh, H, qr_b, qr_h)
    c, kr, uk, uv = c + b * c_b, kr + b * kr_b, uk + h * uk_h, uv + h * uv_h
    do, o = head(do, bh, H, g_b, g_h), head(o, bh, H, o_b, o_h)
    lse += bh.to(tl.int64) * N
    if dlse is not None:
        dlse += bh.to(tl.int64) * N
    if mask is not None:
        mask += b * N
    if slopes is not None:
        slopes += h
    x, y = tile(qn, qn_n, i, N, 0, DN, BK), tile(qr, qr_n, i, N, 0, DR, BP)
    dx = tl.zeros((BN, BK), tl.float32)
    dy = tl.zeros((BN, BP), tl.float32)
    end = tl.minimum((tl.program_id(1) + 1) * BN, N) if CAUSAL else N
    for start in range(0, end, BN):
        j = start + tl.arange(0, BN)
        k = expanded(c, c_n, uk, uk_d, j, N, R, DN, BN, BK, BR, PRECISION)
        v = expanded(c, c_n, uv, uv_d, j, N, R, DV, BN, BV, BR, PRECISION)
        rotary = tile(kr, kr_n, j, N, 0, DR, BP)
        s, steep = scores(x, y, k, rotary, i, j, mask, slopes, N, scale, cap, CAUSAL, DR, PRECISION)
        _, ds, _ = pair_gradients(
            s, steep, v, do, g_n, o, o_n, lse, dlse, i, N, scale, DV, BV, PRECISION
        )
        seen, hides = i[:, None] >= j[None, :], start == tl.program_id(1) * BN if CAUSAL else False
        ds_k, k = hide(ds, k, seen, hides)
        dx += dot(ds_k, k, PRECISION)
        if DR > 0:
            ds_k, rotary = hide(ds, rotary, seen, hides)
            dy += dot(ds_k, rotary, PRECISION, "b")
    put(head(dqn, bh, H, dqn_b, dqn_h), dqn_n, i, N, 0, dx, DN, BK)
    if DR > 0:
        put(head(dqr, bh, H, dqr_b, dqr_h), dqr_n, i, N, 0, dy, DR, BP)


# --- launcher -------------------------------------------------------------------------------------


def backward(*args):
    """tab::mla_bwd"""
    *tensors, scale, causal = args
    return bent_backward(*tensors, None, scale, causal, 0.0)


def bent_backward(
    do, dlse, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, o, lse, key_mask, slopes, scale, causal,
    softcap,
):  # fmt: skip
    """tab::bent_mla_bwd"""
    both = do if None in (key_mask, dlse) else torch.cat([do.float(), dlse[..., None]], -1)
    q_nope, q_rope, o = answered(key_mask, both, q_nope, q_rope, o)
    (lse,) = answered(key_mask, both, lse[..., None], fill=torch.inf)
    do, o = rows(do), rows(o)
    lse, dlse = whole(lse, dlse)
    (b, h, n, dn), dr, (dv, r) = q_nope.shape, q_rope.shape[-1], w_uv.shape[1:]
    m = meta(q_nope, q_rope, w_uv, causal, backward=True)
    tiles = cdiv(n, m["BN"])
    dqn, dqr = token_major_empty(q_nope), token_major_empty(q_rope)
    dkv = q_nope.new_empty(b, n, h, dn + dv)
    dkr = q_nope.new_empty(b, h, n, dr, dtype=torch.float32)
    given = arguments(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask, slopes)
    given += *strided(do, o), lse, dlse, *strided(dqn, dqr)
    rest = n, h, scale, softcap or None
    launch(mla_grad_kv, (b * h, tiles), *given, dkv, dkr, *rest, WITH_Q=tiles == 1, **m)
    if tiles > 1:
        launch(mla_grad_q, (b * h, tiles), *given, *rest, **m)
    (c_kv,) = real_tokens(key_mask, c_kv)
    dkv, c = dkv.view(b * n, -1), c_kv.reshape(b * n, r)  # (B·N, H·(Dn+Dv)), (B·N, R)
    dc = (dkv @ torch.cat([w_uk, w_uv], 1).flatten(0, 1)).view(b, n, r)
    dw = (dkv.mT @ c).view(h, dn + dv, r)
    dw_uk, dw_uv = (x.contiguous() for x in dw.split([dn, dv], 1))
    return dqn, dqr, dc, dkr.sum(1).to(q_nope.dtype), dw_uk, dw_uv


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for *operands, mask, scale, causal in mla.cases():
        yield *_given(operands), mask, scale, causal


def bent_cases():
    for *operands, mask, slopes, scale, causal, softcap in mla.bent_cases():
        yield *_given(operands), mask, slopes, scale, causal, softcap


def _given(operands) -> tuple:
    """do, dlse, the operands, o, lse"""
    (b, h, n, _), (_, dv, _) = operands[0].shape, operands[-1].shape
    o = operands[0].new_empty(b, h, n, dv)
    lse = o.new_empty(b, h, n, dtype=torch.float32)
    return o, lse, *operands, o, lse


register("mla_bwd", backward, takes=lambda do, dlse, *x: takes(*x), cases=cases)
register("bent_mla_bwd", bent_backward, takes=lambda do, dlse, *x: takes(*x), cases=bent_cases)
