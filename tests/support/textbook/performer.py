"""FAVOR+ as the paper has it, inputs for it, and the operator called alike."""

import torch

from tab import orthogonal_projection, performer_attention

KERNELS = ("softmax", "relu")


def features(x, w, kernel):
    """M^(-1/2)·e^(W x̂ - ‖x̂‖²/2), as the paper has it"""
    x = x * x.shape[-1] ** -0.25
    wx = x @ w.to(x.dtype).mT
    if kernel == "relu":
        return wx.relu() * w.shape[0] ** -0.5
    return (wx - x.square().sum(-1, keepdim=True) / 2).exp() * w.shape[0] ** -0.5


def naive(q, k, v, s0=None, z0=None, *, w, kernel="softmax", causal=False, key_mask=None):
    """-> o, S, z with nothing shifted"""
    fq, fk = features(q, w, kernel), features(k, w, kernel)
    if key_mask is not None:
        fk = fk * key_mask[:, None, :, None]
    a = fq @ fk.mT  # (B, H, N, N)
    a = a.tril() if causal else a
    num, den, s, z = a @ v, a.sum(-1, keepdim=True), fk.mT @ v, fk.sum(-2)
    if s0 is not None:
        num = num + (fq.to(s0.dtype) @ s0).to(num.dtype)
        den = den + (fq.to(s0.dtype) @ z0[..., None]).to(num.dtype)
        s, z = s0 + s, z0 + z
    return num / den, s, z


def exact(q, k, v, w, causal):
    """The softmax estimator in float64 and in logarithms, for inputs of any size."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    scale = q.shape[-1] ** -0.25
    a = (k * scale) @ w.mT - (k * scale).square().sum(-1, keepdim=True) / 2
    logits = torch.logsumexp((q * scale @ w.mT)[:, :, :, None] + a[:, :, None], -1)
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(-1) @ v


def draw(generator, b=2, h=3, n=65, d=8, dv=8, m=12, dtype=torch.float32, scale=1.0):
    shapes = ((b, h, n, d), (b, h, n, d), (b, h, n, dv))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    w = orthogonal_projection(m, d, generator=generator, dtype=torch.float64)
    acc = torch.promote_types(dtype, torch.float32)
    return (q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype), w.to(acc)


def call(w, **options):
    return lambda q, k, v: performer_attention(
        q, k, v, w.to(torch.promote_types(q.dtype, torch.float32)), **options
    )
