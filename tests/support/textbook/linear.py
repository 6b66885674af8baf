"""Linear attention with its N×N weights written down, and inputs for it."""

import torch
from torch.nn import functional as F

PHI = {"elu1": lambda x: F.elu(x) + 1, "relu": F.relu, "identity": lambda x: x}


def naive(q, k, v, s0=None, z0=None, *, feature_map="elu1", causal=False, key_mask=None, eps=0.0):
    """-> o, and S, z in the accumulation type; a denominator of 0 gives 0"""
    q, k = PHI[feature_map](q), PHI[feature_map](k)  # (B, H, N, D)
    if key_mask is not None:
        k = k * key_mask[:, None, :, None]
    weights = q @ k.mT  # (B, H, N, N)
    weights = weights.tril() if causal else weights
    total, den = weights @ v, weights.sum(-1, keepdim=True) + eps
    s, z = k.mT @ v, k.sum(-2)
    if s0 is not None:
        total, den = total + q @ s0.to(q.dtype), den + q @ z0.to(q.dtype)[..., None]
        s, z = s + s0, z + z0
    acc = torch.promote_types(q.dtype, torch.float32)
    o = torch.where(den == 0, 0.0, total / torch.where(den == 0, 1.0, den))
    return o, s.to(acc), z.to(acc)


def draw(generator, b=2, h=3, n=65, d=20, dv=28, state=False, dtype=torch.float32):
    def make(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(of)

    acc = torch.promote_types(dtype, torch.float32)
    x = [make(b, h, n, d), make(b, h, n, d), make(b, h, n, dv)]
    # A denominator far from 0: the state is positive, as any sum of elu + 1 is.
    return x + [make(b, h, d, dv, of=acc), make(b, h, d, of=acc).abs()] * state
