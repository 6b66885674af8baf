"""Latent attention in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import math

import pytest
import torch
from emulated import FLOOR, HEADS, SEES, TYPES, heads, pointer, run, spoilt, struct, unit_last
from proof import assert_accurate

from tab.ops.mla import forward_reference

LATENTS = struct(
    "Latents", "int heads dn dr r dv; float scale; Sees sees; Heads qn qr c kr; pointer uk uv"
)
FORWARD = struct("Forward", "Latents in; Heads o; pointer lse peak")
BACKWARD = struct("Backward", "Latents in; Heads do; pointer lse dlse; Heads dqn dqr dk dv dkr")


class Mla(torch.autograd.Function):
    """The kernels, and the sums over heads and batch that csrc/cuda/mla/mla.cu leaves to cuBLAS."""

    @staticmethod
    def forward(ctx, qn, qr, c, kr, uk, uv, mask, scale, causal, nan=False):
        ctx.save_for_backward(qn, qr, c, kr, uk, uv)
        ctx.mask, ctx.nan = mask, nan
        (_, h, n, dn), dr, r, dv = qn.shape, qr.shape[3], c.shape[2], uv.shape[1]
        sees = SEES(n, causal, n, n, 0, 0, None, None, 0, 0, pointer(mask))
        shared = (HEADS(x.data_ptr(), x.stride(0), 0, x.stride(1)) for x in (c, kr))
        ctx.read = LATENTS(
            h, dn, dr, r, dv, scale, sees, heads(qn), heads(qr), *shared, uk.data_ptr(),
            uv.data_ptr(),
        )  # fmt: skip

        def make(o, lse, peak):
            return FORWARD(ctx.read, heads(o), lse.data_ptr(), peak.data_ptr())

        like = qn[..., :1].expand(*qn.shape[:3], dv)
        o, ctx.lse, peak = run("mla_fwd", make, qn, [like, qn[..., 0], qn[..., 0, 0]], nan)
        ctx.mark_non_differentiable(peak)
        return o, ctx.lse, peak

    @staticmethod
    def backward(ctx, do, dlse, _):
        qn, qr, c, _, uk, uv = ctx.saved_tensors
        do, dlse = unit_last(do), dlse.contiguous()

        def make(*outputs):
            pointers = ctx.lse.data_ptr(), dlse.data_ptr()
            return BACKWARD(ctx.read, heads(do), *pointers, *map(heads, outputs))

        dqn, dqr, dk, dv, dkr = run("mla_bwd", make, qn, [qn, qr, qn, do, qr], ctx.nan)
        if ctx.mask is not None:  # what a masked token holds is not summed over
            c = c.masked_fill(~ctx.mask[..., None], 0)
        dk, dv, c = dk.float(), dv.float(), c.float()  # (B, H, N, Dn), (B, H, N, Dv), (B, N, R)
        dc = torch.einsum("bhnd,hdr->bnr", dk, uk.float())
        dc += torch.einsum("bhnd,hdr->bnr", dv, uv.float())
        duk, duv = (torch.einsum("bhnd,bnr->hdr", x, c) for x in (dk, dv))
        shared = (x.to(qn.dtype) for x in (dc, dkr.float().sum(1), duk, duv))
        return dqn, dqr, *shared, None, None, None, None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    ("b", "h", "n", "dn", "dr", "r", "dv", "causal"),
    [(1, 1, 1, 8, 0, 5, 3, False), (2, 3, 17, 12, 4, 33, 8, True),
     (1, 2, 63, 33, 16, 64, 40, False), (1, 1, 64, 70, 68, 96, 72, True),
     (1, 2, 2, 8, 8, 8, 96, False)],
)  # fmt: skip
def test_mla(b, h, n, dn, dr, r, dv, causal, masked, dtype, generator):
    shapes = (b, n, h, dn), (b, n, h, dr), (b, n, r), (b, n, dr), (h, dn, r), (h, dv, r)
    x = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    x = [t.transpose(1, 2) if t.dim() == 4 else t for t in x]
    x = [*x[:4], *(t * r**-0.5 for t in x[4:])]
    mask = torch.rand(b, n, generator=generator) > 0.3 if masked else None

    def finite(f):  # where a token sees nothing, lse is −∞, and peak has no gradient
        def call(*x):
            if not dr:
                x = x[0], x[0].new_empty(b, h, n, 0), x[1], x[1].new_empty(b, n, 0), *x[2:]
            o, lse, peak = (y.masked_fill(y == -torch.inf, 0.0) for y in f(*x, mask, 0.2, causal))
            return o, lse, peak.detach() + 0 * lse.sum()

        return call

    x = [t for t in x if t.numel()]
    assert_accurate(finite(Mla.apply), finite(forward_reference), x, floor=FLOOR[dtype])


def operands(generator, dtype=torch.float32):
    """B 2, H 2, N 30, Dn 12, Dr 4, R 70, Dv 10"""
    shapes = (2, 30, 2, 12), (2, 30, 2, 4), (2, 30, 70), (2, 30, 4), (2, 12, 70), (2, 10, 70)
    qn, qr, *rest = ((torch.randn(s, generator=generator) / 3).to(dtype) for s in shapes)
    return [qn.transpose(1, 2), qr.transpose(1, 2), *rest]


@pytest.mark.parametrize("which", range(4), ids=["q_nope", "q_rope", "c_kv", "k_rope"])
def test_nan_is_seen(which, generator):
    """In the output, in lse and in the largest score."""
    x = operands(generator)
    x[which][(0, 1, 5, 2) if which < 2 else (0, 5, 2)] = math.nan
    o, lse, peak = Mla.apply(*x, None, 0.2, False, True)
    rows = [5] if which < 2 else list(range(30))
    assert o[0, 1].isnan().any(-1).nonzero().flatten().tolist() == rows
    assert lse[0, 1].isnan().nonzero().flatten().tolist() == rows
    assert peak.isnan().tolist() == [[which >= 2, True], [False, False]]
    assert o[1].isfinite().all()


@pytest.mark.parametrize("where", ((2, 3), (0, 1)), ids=("latents", "q"))
@pytest.mark.parametrize(("causal", "dtype"), ((False, TYPES[0]), (True, TYPES[1])))
def test_masked_tokens_reach_nobody(causal, dtype, where, generator):
    """In latents nobody at all, in q nobody else, if nothing hangs on the output of that token."""
    x, mask = operands(generator, dtype), torch.rand(2, 30, generator=generator) > 0.3
    mask[:, 0] = True  # everybody sees a key
    hidden = ~mask[:, None]
    dirty = [spoilt(y, mask) if i in where else y for i, y in enumerate(x)]

    def results(x):
        x = [y.detach().requires_grad_() for y in x]
        o, lse, peak = Mla.apply(*x, mask, 0.2, causal, where == (0, 1))
        if where == (0, 1):
            o, lse = o.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, 0)
        return o, lse, peak, *torch.autograd.grad(o.sin().sum() + lse.sum(), x)

    for a, b in zip(results(dirty), results(x), strict=True):
        assert b.isfinite().all() and torch.equal(a, b)
