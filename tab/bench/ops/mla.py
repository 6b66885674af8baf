"""Multi-head latent attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.deepseek_mla import DeepSeekMLA
from ...ops.mla import mla_attention, mla_fwd
from ...ops.mla_decode import mla_decode, mla_decode_op
from ..benchmark import Benchmark, Contestant, Problem, eager_and_compiled, nothing

RANK, ROPE = 64, 16  # R and Dr; Dn and Dv are D/2 each


def expand(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *, causal: bool = False) -> Tensor:
    """K_h and V_h of every head are written, then exact attention."""
    h, scale = q_nope.shape[1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    k = torch.cat(
        [torch.einsum("bnr,hdr->bhnd", c_kv, w_uk), k_rope[:, None].expand(-1, h, -1, -1)], -1
    )
    v = torch.einsum("bnr,hdr->bhnd", c_kv, w_uv)
    q = torch.cat([q_nope, q_rope], -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def absorb(q_nope, q_rope, cache, w_uk, w_uv) -> Tensor:
    """q_nope (B, H, Dn), cache (B, N, R+Dr) all in use -> (B, H, Dv)."""
    r, scale = w_uk.shape[-1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    q = torch.cat([torch.einsum("bhd,hdr->bhr", q_nope, w_uk), q_rope], -1)
    z = (q @ cache.mT * scale).softmax(-1) @ cache[..., :r]  # (B, H, R)
    return torch.einsum("bhr,hvr->bhv", z, w_uv)


def absorb_sdpa(q_nope, q_rope, cache, w_uk, w_uv) -> Tensor:
    """The same with the heads as queries of PyTorch's fused kernel, values as wide as keys."""
    r, scale = w_uk.shape[-1], (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    q = torch.cat([torch.einsum("bhd,hdr->bhr", q_nope, w_uk), q_rope], -1)[:, None]
    z = F.scaled_dot_product_attention(q, cache[:, None], cache[:, None], scale=scale)
    return torch.einsum("bhr,hvr->bhv", z[:, 0, :, :r], w_uv)


class MLADecode(Benchmark):
    """One token more, from the cache of latents."""

    op, differentiable = mla_decode_op, False

    def problem(self, case, draw):
        (b, h, n, d), scale = case.shape, RANK**-0.5
        up = (draw(h, d // 2, RANK, scale=scale) for _ in ("k", "v"))
        inputs = draw(b, h, d // 2), draw(b, h, ROPE), draw(b, n, RANK + ROPE), *up
        return Problem(case, self, inputs, weights=2)

    def ours(self, p, backend):
        rows = torch.full((p.inputs[2].shape[0],), p.case.shape[2], device=p.case.device)
        return lambda q_nope, q_rope, cache, *w: mla_decode(
            q_nope, q_rope, cache, rows, *w, backend=backend
        )

    def flops(self, p):
        b, h, n, d = p.case.shape
        up, each = 2 * RANK * 2 * (d // 2), 2 * n * (RANK + ROPE) + 2 * n * RANK
        return (b * h * (up + each),)

    def written(self, p):
        return p.inputs[0].nbytes  # o (B, H, Dv), and Dv = Dn here

    def pytorch(self, p):
        yield from eager_and_compiled(absorb, "absorb", differentiable=False)
        yield Contestant("absorb+sdpa", lambda _: absorb_sdpa, differentiable=False)


class MLA(Benchmark):
    op, decode = mla_fwd, MLADecode()

    def problem(self, case, draw):
        (b, h, n, d), scale = case.shape, RANK**-0.5
        shapes = (b, h, n, d // 2), (b, h, n, ROPE), (b, n, RANK), (b, n, ROPE)
        up = (draw(h, d // 2, RANK, scale=scale) for _ in ("k", "v"))
        return Problem(case, self, (*(draw(*shape) for shape in shapes), *up), weights=2)

    def ours(self, p, backend):
        form = "auto" if backend == "auto" else "fused"
        return partial(mla_attention, causal=p.case.causal, form=form, backend=backend)

    def flops(self, p):
        """K and V from the latents, scores over Dn + Dr, sums over Dv; twice that backward."""
        b, h, n, d = p.case.shape
        pairs = b * h * n * (n + 1) // 2 if p.case.causal else b * h * n * n
        up = 2 * RANK * 2 * (d // 2) * b * h * n
        forward = up + 2 * (d // 2 + ROPE) * pairs + 2 * (d // 2) * pairs
        return forward, 2 * forward

    def written(self, p):
        return p.inputs[0].nbytes  # o (B, H, N, Dv), and Dv = Dn here

    def pytorch(self, p):
        return eager_and_compiled(partial(expand, causal=p.case.causal), "expand+sdpa")

    def part(self, layer):
        return layer.attention if isinstance(layer, DeepSeekMLA) else None

    def use_pytorch(self, part):
        def forward(x, key_mask=None, max_logits=False):
            o = expand(*part.project(x), part.w_uk, part.w_uv)
            return part.out(o.transpose(1, 2).flatten(2)), None

        part.forward = forward

    def use_nothing(self, part):
        def forward(x, key_mask=None, max_logits=False):
            q_nope, *rest = part.project(x)
            shape = (*q_nope.shape[:3], part.w_uv.shape[-2])
            o = nothing(shape, q_nope, *rest, part.w_uk, part.w_uv)
            return part.out(o.transpose(1, 2).flatten(2)), None

        part.forward = forward


benchmark = MLA()
