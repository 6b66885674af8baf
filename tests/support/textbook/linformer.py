"""Linformer as the paper has it, and inputs for it."""

import torch


def naive(q, k, v, E, F=None, *, scale=None, key_mask=None):
    F = E if F is None else F
    n = k.shape[2]
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
    if E.dim() == 2:
        k, v = (torch.einsum("nk,bhnd->bhkd", p[:n], x) for p, x in ((E, k), (F, v)))
    else:
        k, v = (torch.einsum("hnk,bhnd->bhkd", p[:, :n], x) for p, x in ((E, k), (F, v)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (torch.einsum("bhnd,bhkd->bhnk", q, k) * scale).softmax(-1) @ v


def draw(generator, b=2, h=3, n=65, d=8, dv=8, rank=7, longest=None, per_head=False, dtype=None):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype or torch.float)

    q, k, v = normal(b, h, n, d), normal(b, h, n, d), normal(b, h, n, dv)
    rows = (h,) if per_head else ()
    longest = n if longest is None else longest
    E, F = (normal(*rows, longest, rank) * longest**-0.5 for _ in range(2))
    return q, k, v, E, F
