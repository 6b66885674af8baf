"""Gated linear attention with a decay of each head and token, as simple GLA and Mamba-2 have it."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.gated_linear import gated_linear_attention, gated_linear_fwd
from ..benchmark import Benchmark, Contestant, Problem, eager_and_compiled, peer


def eager(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """((Q Kᵀ) ∘ L) V, L_ij = e^(g_{j+1} + … + g_i): the N×N weights of the papers."""
    until = g.cumsum(-1)  # (B, H, N)
    later = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    decay = (until[..., None] - until[..., None, :]).masked_fill(later, -torch.inf).exp()
    return ((q @ k.mT) * decay.to(q.dtype) * q.shape[-1] ** -0.5) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int = 64) -> Tensor:
    """The same by chunks: weights within one, and a state that goes from each to the next, as the
    listing of Mamba-2 has it (Dao and Gu 2024, listing 1)."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    size = min(size, n)
    q, k, v = (F.pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for x in (q, k, v))
    until = F.pad(g, (0, -n % size)).unflatten(2, (-1, size)).cumsum(-1)[..., None].to(q.dtype)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    decay = (until - until.mT).masked_fill(later, -torch.inf).exp()
    last = until[..., -1:, :]
    new = (k * (last - until).exp()).mT @ v
    state, before = torch.zeros_like(new[:, :, 0]), []
    for i in range(q.shape[2]):
        before.append(state)
        state = last[:, :, i].exp() * state + new[:, :, i]
    o = (q * until.exp()) @ torch.stack(before, 2) + ((q @ k.mT) * decay) @ v
    return (o * scale).flatten(2, 3)[:, :, :n]


class GatedLinear(Benchmark):
    op, causal = gated_linear_fwd, (True,)

    def problem(self, case, draw):
        b, h, n, _ = case.shape
        q, k, v = (draw(*case.shape) for _ in "qkv")
        return Problem(case, self, (q, k, v, F.logsigmoid(draw(b, h, n).to(draw.accumulate)) / 8))

    def ours(self, p, backend):
        return partial(gated_linear_attention, backend=backend)

    def flops(self, p):
        b, h, n, d = p.case.shape
        return 4 * d * d * b * h * n, 8 * d * d * b * h * n

    def pytorch(self, p):
        yield from eager_and_compiled(eager)
        yield Contestant("chunked", lambda _: chunked)

    def peers(self, p):
        yield peer("flash-linear-attention", "fla", _fla, p, gpu_only=True)


def _fla(p: Problem):
    module = importlib.import_module("fla.ops.simple_gla")

    def attend(q, k, v, g):
        o, _ = module.chunk_simple_gla(*(x.transpose(1, 2) for x in (q, k, v, g)))
        return o.transpose(1, 2)

    return attend


benchmark = GatedLinear()
