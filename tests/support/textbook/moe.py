"""Experts and their router by their formulas: each token with its own experts, one at a time."""

import torch
from torch.nn import functional as F


def gate(logits, bias, top_k, n_group, topk_group, route_scale):
    """DeepSeek-V3 eq. 13-16 for one token, in Python numbers. -> {expert: weight}"""
    s = [1 / (1 + torch.tensor(-x).exp().item()) for x in logits.tolist()]
    biased = [a + b for a, b in zip(s, bias.tolist(), strict=True)]
    per = len(s) // n_group
    groups = [range(g * per, (g + 1) * per) for g in range(n_group)]
    best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))
    allowed = [e for g in best[:topk_group] for e in g]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
    total = sum(s[e] for e in chosen)
    return {e: s[e] / total * route_scale for e in chosen}


def experts(index):
    """The formula word for word: each token with its own copy of its i-th expert's matrices."""

    def f(x, w13, w2, weights):
        y = 0.0
        for i in range(index.shape[-1]):
            e = index[..., i]
            gate, up = torch.einsum("...c,...fc->...f", x, w13[e]).chunk(2, -1)
            out = torch.einsum("...f,...cf->...c", F.silu(gate) * up, w2[e])
            y = y + out * weights[..., i, None]
        return y.to(x.dtype)

    return f
