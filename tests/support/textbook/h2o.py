"""H2O as the paper's algorithm 1: one batch entry, head, token and slot at a time."""

import torch


def evict(score, heavy, recent):
    """score {token: A} -> the tokens that stay, leaving one by one."""
    last = max(score)
    score = dict(score)
    while len(score) > heavy + recent:
        old = [j for j in score if j <= last - recent]
        del score[min(old, key=score.get)]
    return score


def attend(q, k, v, tokens, scale):
    """q (D,) over the tokens -> o (Dv,), p {token: weight}"""
    p = (k[tokens] @ q * scale).softmax(0)
    return p @ v[tokens], dict(zip(tokens, p.tolist(), strict=True))


def algorithm1(q, k, v, heavy, recent, causal, block, scale):
    """One head, (N, D) -> (N, Dv), and the final {token: A}. Algorithm 1 with blocks for tokens."""
    n, score, out = len(q), {}, []
    for start in range(0, n, block):
        own = list(range(start, min(start + block, n)))
        slots = {**score, **dict.fromkeys(own, 0.0)}
        for i in own:
            o, p = attend(q[i], k, v, [j for j in slots if j <= i or not causal], scale)
            out.append(o)
            slots = {j: a + p.get(j, 0.0) for j, a in slots.items()}
        score = evict(slots, heavy, recent)
    return torch.stack(out), score


def two_passes(q, k, v, heavy, recent, causal, scale):
    """One head: full attention chooses, then attends to the chosen."""
    n, out = len(q), []
    seen = [list(range(i + 1 if causal else n)) for i in range(n)]
    full = [attend(q[t], k, v, seen[t], scale)[1] for t in range(n)]
    for i in range(n):
        score = dict.fromkeys(seen[i], 0.0)
        for t in seen[i]:
            score = {j: a + full[t].get(j, 0.0) for j, a in score.items()}
        out.append(attend(q[i], k, v, sorted(evict(score, heavy, recent)), scale)[0])
    return torch.stack(out)


def naive(q, k, v, *, heavy, recent, causal=False, mode="streaming", block=64, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = []
    for head in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True):
        if mode == "exact":
            heads.append(two_passes(*head, heavy, recent, causal, scale))
        else:
            heads.append(algorithm1(*head, heavy, recent, causal, block, scale)[0])
    return torch.stack(heads).unflatten(0, q.shape[:2])


def draw(generator, b=2, h=2, n=20, d=8, dv=5, dtype=torch.float32):
    return [
        torch.randn(b, h, n, width, generator=generator, dtype=torch.float64).to(dtype)
        for width in (d, d, dv)
    ]
