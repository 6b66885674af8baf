"""Gated linear attention as its recurrence, token by token, inputs for it, and TAB's beside it."""

import pytest
import torch
from backends import needs_cpp
from torch.nn import functional as F

from tab import gated_linear_attention

# What decays at a rate of its own, and the backends that know it.
DECAYS = [(decay, "reference") for decay in ("head", "token", "channel")]
DECAYS += [
    pytest.param((decay, "cpp"), marks=needs_cpp("gated_linear_fwd")) for decay in ("head", "token")
]


def naive(q, k, v, g, s0=None, z0=None, *, scale=None, normalize=False, key_mask=None):
    """-> o and S, and with normalize z: S and z in the accumulation type"""
    b, h, n, d = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 if normalize else d**-0.5 if scale is None else scale
    if g.dim() == 1:
        g = g[:, None].expand(b, h, n)
    if g.dim() == 3:
        g = g[..., None].expand(b, h, n, d)
    s = torch.zeros(b, h, d, v.shape[-1], dtype=acc) if s0 is None else s0
    z = torch.zeros(b, h, d, dtype=acc) if z0 is None else z0
    outs, rows = [], (q.to(acc), k.to(acc), v.to(acc), g.to(acc).exp())
    # One token each, (B, H, ·). To take them one by one would fill a gradient of all for each.
    for t, (q_t, k_t, v_t, decay) in enumerate(zip(*(x.unbind(2) for x in rows), strict=True)):
        new_s = decay[..., None] * s + k_t[..., None] * v_t[..., None, :]
        new_z = decay * z + k_t if normalize else z
        if key_mask is not None:
            real = key_mask[:, t, None, None]
            new_z = torch.where(real, new_z, z)
            new_s = torch.where(real[..., None], new_s, s)
        s, z = new_s, new_z
        o = scale * (q_t[..., None, :] @ s)[..., 0, :]
        if normalize:
            den = (q_t * z).sum(-1, keepdim=True)
            o = torch.where(den == 0, 0.0, o / torch.where(den == 0, 1.0, den))
        outs.append(o)
    o = torch.stack(outs, 2).to(q.dtype)
    return (o, s, z) if normalize else (o, s)


def draw(generator, b=2, h=3, n=65, d=20, dv=28, decay="token", state=False, dtype=torch.float32):
    """q, k, v, g and, with state, S₀."""

    def make(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of)

    acc = torch.promote_types(dtype, torch.float32)
    g = {"head": (h,), "token": (b, h, n), "channel": (b, h, n, d)}[decay]
    x = [make(b, h, n, d), make(b, h, n, d), make(b, h, n, dv)]
    x.append(F.logsigmoid(make(*g, of=acc)) / (1 + 9 * (decay == "head")))
    return x + [make(b, h, d, dv, of=acc)] * state


def call(**options):
    """TAB's function as `naive` is called: -> o, S and perhaps z."""

    def f(q, k, v, g, s0=None, z0=None):
        first = s0 if z0 is None else (s0, z0)
        o, state = gated_linear_attention(
            q, k, v, g, initial_state=first, return_state=True, **options
        )
        return (o, *state) if options.get("normalize") else (o, state)

    return f
