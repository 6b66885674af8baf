"""The layers deepseek_mla and kimi_k2 by their formulas, one token and one head at a time."""

import torch


def turned(x, theta):
    """Rotary positions by complex numbers: pair i at position p times exp(i·p·θ^(−2i/D))."""
    n, d = x.shape[-2:]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    speed = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * speed
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def swiglu(x, w13, w2):
    gate, up = (x @ w13.T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ w2.T


def slow_moe(moe, x):
    """y = shared(x) + Σ w E(x), token by token, from the layer's own weights in float64."""
    y = swiglu(x, moe.shared.w13.weight.double(), moe.shared.w2.weight.double())
    s = (x @ moe.router.weight.double().T).sigmoid()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            biased = s[b, t] + moe.bias.double()
            if moe.route["n_group"] > 1:
                groups = biased.unflatten(0, (moe.route["n_group"], -1))
                best = groups.topk(2, -1).values.sum(-1).argsort(descending=True)
                groups[best[moe.route["topk_group"] :]] = -torch.inf
                biased = groups.flatten()
            chosen = biased.argsort(descending=True)[: moe.route["top_k"]]
            for e in chosen:
                weight = s[b, t, e] / s[b, t, chosen].sum() * moe.route["route_scale"]
                y[b, t] += weight * swiglu(x[b, t], moe.w13[e].double(), moe.w2[e].double())
    return y


def slow_layer(layer, kind, x):
    """The whole layer by its formulas, head by head, in float64. -> y, P (B, H, N, N)"""
    x = x.double()
    at, outputs, matrices = layer.attention, [], []
    if kind == "kimi-mha":
        wq, wk, wv = at.qkv.weight.double().unflatten(0, (3, 3, -1))
        for h in range(3):
            q, k = turned(x @ wq[h].T, 5e4), turned(x @ wk[h].T, 5e4)
            matrices.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
            outputs.append(matrices[-1] @ (x @ wv[h].T))
        bias = at.out.bias.double()
    else:
        theta = 5e4 if kind == "kimi-mla" else 1e4
        cq = rms(x @ at.q_down.weight.double().T, at.q_norm.weight) if kind[-1] == "q" else x
        q = (cq @ at.q_up.weight.double().T).unflatten(-1, (3, -1))
        c, kr = (x @ at.kv_down.weight.double().T).split([at.kv_rank, at.rope_dim], -1)
        c = rms(c, at.kv_norm.weight)
        for h in range(3):
            qn, qr = q[:, :, h].split([at.nope_dim, at.rope_dim], -1)
            k = torch.cat([c @ at.w_uk[h].double().T, turned(kr, theta)], -1)
            s = torch.cat([qn, turned(qr, theta)], -1) @ k.mT
            matrices.append((s / k.shape[-1] ** 0.5).softmax(-1))
            outputs.append(matrices[-1] @ c @ at.w_uv[h].double().T)
        bias = 0.0
    a = torch.cat(outputs, -1) @ at.out.weight.double().T + bias
    return a + slow_moe(layer.moe, rms(x + a, layer.norm.weight)), torch.stack(matrices, 1)
