"""Decoding in plain PyTorch, which TAB's caches are held against. Each begins with a prompt, says
what it holds, and goes on by `step`, one token more, (B, H, 1, D) each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops.linear import eager_decode
from .ops.mla import absorb


class Sdpa:
    """Softmax attention by SDPA over a KV cache that is reserved beforehand."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, room: int):
        self.length = k.shape[2]
        self.held = [F.pad(x, (0, 0, 0, room)) for x in (k, v)]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for held, x in zip(self.held, (k, v), strict=True):
            held[:, :, self.length] = x[:, :, 0]
        self.length += 1
        k, v = (x[:, :, : self.length] for x in self.held)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])


class Recurrent:
    """Linear attention as flash-linear-attention's recurrent reference has it, with its denominator
    (`normalize`): S ← S + k vᵀ, z ← z + k, o = Sᵀq/(zᵀq + 10⁻¹⁰), by products and sums that are
    written; φ = elu + 1 is applied before."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        k, v = (x.float() if x.dtype != torch.float64 else x for x in (_feature(k), v))
        self.held = [k.mT @ v, k.sum(2)]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, z = self.held
        dtype = q.dtype
        q, k, v = (x[:, :, 0].to(s.dtype) for x in (_feature(q), _feature(k), v))
        s += k[..., None] * v[..., None, :]
        z += k
        o = (q[..., None] * s).sum(-2) / ((q * z).sum(-1, keepdim=True) + 1e-10)
        return o[:, :, None].to(dtype)


class RecurrentGated:
    """Gated linear attention as flash-linear-attention's recurrent reference has it, one decay a
    head: S ← e^g S + k vᵀ, o = D^(-1/2)·Sᵀq."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor):
        later = torch.arange(k.shape[2], device=k.device).flip(0)  # tokens after each
        k = k.to(log_decay.dtype) * (log_decay[:, None] * later).exp()[..., None]
        self.held = [k.mT @ v.to(k.dtype)]
        self.decay, self.scale = log_decay[:, None, None], q.shape[-1] ** -0.5

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (s,), dtype = self.held, q.dtype
        q, k, v = (x[:, :, 0].to(s.dtype) for x in (q, k, v))
        s *= self.decay.exp()
        s += k[..., None] * v[..., None, :]
        return ((q * self.scale)[..., None] * s).sum(-2)[:, :, None].to(dtype)


class EagerLinear:
    """The same by matrix products."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.held = Recurrent(q, k, v).held

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (t.to(self.held[0].dtype) for t in (q, k, v))
        o, self.held = eager_decode(*x, *self.held)
        return o.to(q.dtype)


class EagerPerformer:
    """FAVOR+ relative to a shift: c' = max(c, a), S' = S·e^(c − c') + e^(a − c') vᵀ."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor):
        self.projection, self.scale = projection, q.shape[-1] ** -0.25
        a, v = self._keys(k), v.to(projection.dtype)
        c = a.amax(2, keepdim=True)
        f = (a - c).exp()
        self.held = [f.mT @ v, f.sum(2, keepdim=True).mT, c.mT]  # (B, H, M, Dv), twice (B, H, M, 1)

    def _keys(self, k: Tensor) -> Tensor:
        k = k.to(self.projection.dtype) * self.scale
        return k @ self.projection.mT - k.square().sum(-1, keepdim=True) / 2

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (s, z, c), a = self.held, self._keys(k).mT
        top = torch.maximum(c, a)
        old, new = (c - top).exp(), (a - top).exp()
        s, z = s * old + new * v.to(s.dtype), z * old + new
        self.held = [s, z, top]
        b = q.to(s.dtype) * self.scale @ self.projection.mT + top.mT
        f = (b - b.amax(-1, keepdim=True)).exp()
        return (f @ s / (f @ z)).to(q.dtype)


class EagerLocal:
    """A window that rolls: the new token at its end, the oldest one cut off."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: int):
        self.held = [x[:, :, -window - 1 :].clone() for x in (k, v)]
        self.most = window + 1

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = zip(self.held, (k, v), strict=True)
        self.held = [torch.cat([x, y], 2)[:, :, -self.most :] for x, y in new]
        k, v = self.held
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class EagerLatents:
    """Latent attention, absorbed, over rows that are reserved beforehand."""

    def __init__(self, prompt: tuple[Tensor, ...], w_uk: Tensor, w_uv: Tensor, room: int):
        rows = torch.cat(prompt[2:], -1)
        self.length, self.w = rows.shape[1], (w_uk, w_uv)
        self.held = [F.pad(rows, (0, 0, 0, room))]

    def step(self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        rows = self.held[0]
        rows[:, self.length] = torch.cat([c_kv, k_rope], -1)[:, 0]
        self.length += 1
        o = absorb(q_nope[:, :, 0], q_rope[:, :, 0], rows[:, : self.length], *self.w)
        return o[:, :, None]


def _feature(x: Tensor) -> Tensor:
    return F.elu(x) + 1
