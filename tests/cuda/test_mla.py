"""Latent attention in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import pytest
import torch
from emulated import FLOOR, HEADS, SEES, TYPES, heads, pointer, run, struct, unit_last
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
    def forward(ctx, qn, qr, c, kr, uk, uv, mask, scale, causal):
        ctx.save_for_backward(qn, qr, c, kr, uk, uv)
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
        o, ctx.lse, peak = run("mla_fwd", make, qn, [like, qn[..., 0], qn[..., 0, 0]])
        ctx.mark_non_differentiable(peak)
        return o, ctx.lse, peak

    @staticmethod
    def backward(ctx, do, dlse, _):
        qn, qr, c, _, uk, uv = ctx.saved_tensors
        do, dlse = unit_last(do), dlse.contiguous()

        def make(*outputs):
            pointers = ctx.lse.data_ptr(), dlse.data_ptr()
            return BACKWARD(ctx.read, heads(do), *pointers, *map(heads, outputs))

        dqn, dqr, dk, dv, dkr = run("mla_bwd", make, qn, [qn, qr, qn, do, qr])
        dk, dv, c = dk.float(), dv.float(), c.float()  # (B, H, N, Dn), (B, H, N, Dv), (B, N, R)
        dc = torch.einsum("bhnd,hdr->bnr", dk, uk.float())
        dc += torch.einsum("bhnd,hdr->bnr", dv, uv.float())
        duk, duv = (torch.einsum("bhnd,bnr->hdr", x, c) for x in (dk, dv))
        shared = (x.to(qn.dtype) for x in (dc, dkr.float().sum(1), duk, duv))
        return dqn, dqr, *shared, None, None, None


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
