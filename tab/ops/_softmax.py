"""Softmax attention on one tile of queries and keys, forward and backward by formula.

Local, sparse and latent attention differ in which tiles exist; inside a tile they are the same:

    S = scale·QKᵀ (−∞ where not allowed),  L = log Σ_j exp S_j,  O = exp(S − L) V
    P = exp(S − L),  Δ = Σ dO∘O − dL,  dV = PᵀdO,  dS = P∘(dO Vᵀ − Δ),  dQ = scale·dS K,
    dK = scale·dSᵀQ

Dao 2023, "FlashAttention-2", algorithms 1 and 2. A cap c bends the scores, S = c·tanh(scale·QKᵀ/c)
(Gemma 2 2024, sec. 2), and dS is multiplied by 1 − tanh²; a bias is added to what is bent. A row
that is allowed nothing has L = −∞ and O = 0, and passes no gradient. What a pair of tokens that is
not allowed holds, NaN too, reaches nobody. Leading dimensions are the caller's. The forward formula
can be differentiated by autograd as often as one likes, and runs under torch.func.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import transforming
from ._check import one_length
from ._options import finite


def softmax_forward(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float, softcap: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (…, n, D), k (…, m, D), v (…, m, Dv), allowed (…, n, m), None for all, softcap 0 for none,
    bias (…, n, m) -> O (…, n, Dv), L (…, n) and max_j S_j (…, n)."""
    s, _ = _scores(q, k, allowed, scale, softcap, bias)
    peak = s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    p = (s - _finite(peak)[..., None]).exp()
    total = p.sum(-1)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    lse = (_finite(peak) + total.log()).masked_fill(none, -torch.inf)
    return weigh(p, v, allowed) / total[..., None], lse, peak


def softmax_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    allowed: Tensor | None, scale: float, softcap: float = 0.0, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """do (…, n, Dv), lse and Δ (…, n), the rest as in `softmax_forward` -> dq, dk, dv.

    A query whose output nobody used passes no gradient, whatever it holds.
    """
    used = ((do != 0).any(-1) | (delta != 0))[..., None]
    allowed = used.expand(*used.shape[:-1], k.shape[-2]) if allowed is None else allowed & used
    s, slope = _scores(q, k, allowed, scale, softcap, bias)
    p = (s - _finite(lse)[..., None]).exp()
    p = p.masked_fill(~allowed, 0.0)
    ds = p * (do @ v.mT - delta[..., None])
    ds = (ds if slope is None else ds * slope).masked_fill(~allowed, 0.0) * scale
    return weigh(ds, k, allowed), weigh(ds.mT, q, allowed.mT), weigh(p.mT, do, allowed.mT)


def weigh(p: Tensor, x: Tensor, allowed: Tensor | None) -> Tensor:
    """p (…, n, m) @ x (…, m, D), in which a pair that is not allowed counts for nothing: 0·NaN too.

    An x that is not finite makes NaN of the rows that are allowed it.
    """
    if allowed is None or (may_look(x) and x.detach().sum().isfinite()):
        return p @ x
    odd = ~x.isfinite()
    met = allowed.to(x.dtype) @ odd.to(x.dtype)
    return (p @ x.masked_fill(odd, 0.0)).masked_fill(met > 0, torch.nan)


def may_look(x: Tensor) -> bool:
    """Whether values can be looked at: on the CPU, at no cost, unless it is being traced."""
    plain = type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()
    return plain and not (transforming() or torch.jit.is_tracing())


def score_scale(op: str, scale: float | None, width: int) -> float:
    """The caller's scale, else 1/√width, of a double: torch.jit.trace makes tensors of sizes."""
    return float(width) ** -0.5 if scale is None else finite(op, "scale", scale)


def row_sums(do: Tensor, o: Tensor) -> Tensor:
    """Σ do∘o over the last dimension, in which a do of 0 makes 0 of any o."""
    return (do * o).masked_fill(do == 0, 0.0).sum(-1)


def own_heads(q: Tensor, k: Tensor, *_) -> str | None:
    """Why a kernel in which each head of q has its own of k and v does not take these, or None."""
    if q.shape[1] == k.shape[1]:
        return None
    return f"it takes as many heads of k and v as of q, got {k.shape[1]} and {q.shape[1]}"


def plain_softmax(q: Tensor, k: Tensor, v=None, key_mask=None, slopes=None, *options) -> str | None:
    """Why CUDA C++ does not take these arguments of a forward op, of which softcap is the last, or
    None."""
    if key_mask is not None:
        return "it takes no key_mask"
    if slopes is not None or (options and options[-1]):
        return "it takes neither softcap nor alibi"
    return own_heads(q, k) or one_length(q, k)


def check_lse_gradient(op: str, backend: str) -> None:
    """CUDA C++ forms Δ as Σ P∘dP, in which no gradient of L can be put."""
    if backend == "cuda":
        raise RuntimeError(
            f'tab_cuda::{op} has no gradient of lse; use backend="triton" or "reference", or '
            "lse.detach()"
        )


def lse_as_column(
    do: Tensor | None, dlse: Tensor, v: Tensor, o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """do, v and o with one more column, by which Δ = Σ dO∘O becomes Σ dO∘O − dL: 1 in do, 0 in v,
    and −dL in o. So a backward kernel that forms Δ from o needs no argument for dL."""
    do = torch.zeros_like(o) if do is None else do
    extra = do.new_ones(*do.shape[:-1], 1), v.new_zeros(*v.shape[:-1], 1), -dlse[..., None]
    do, v, o = (torch.cat([x, y.to(x.dtype)], -1) for x, y in zip((do, v, o), extra, strict=True))
    return do, v, o


def shared_heads(kv: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """x (B, H, …) by the head of k and v that it shares, (B, H_kv, H/H_kv, …), and k and v with a
    dimension that broadcasts against that; all as they are where q has as many heads."""
    if all(x.shape[1] == kv for x in tensors):
        return tensors
    return tuple(x[:, :, None] if x.shape[1] == kv else x.unflatten(1, (kv, -1)) for x in tensors)


def _scores(q, k, allowed, scale, softcap, bias) -> tuple[Tensor, Tensor | None]:
    """-> S, and its slope 1 − tanh² where there is a cap."""
    s, slope = q @ k.mT * scale, None
    if softcap:
        bent = (s / softcap).tanh()
        s, slope = softcap * bent, 1 - bent * bent
    if bias is not None:
        s = s + bias
    return s if allowed is None else s.masked_fill(~allowed, -torch.inf), slope


def quiet(key_mask: Tensor | None, q: Tensor) -> Tensor:
    """q (B, H, N, D) with 0 where a masked token holds what is not finite: its own output is of no
    use, but the gradients of all keys would meet it."""
    if key_mask is None or key_mask.shape[1] != q.shape[2]:  # a mask of other tokens
        return q
    return q.masked_fill(~key_mask[:, None, :, None] & ~q.isfinite(), 0.0)


def alibi(slopes: Tensor | None, i: Tensor, j: Tensor) -> Tensor | None:
    """−m·|i − j| for slopes m that broadcast against the positions i (…, n, 1) and j (…, 1, m)."""
    return None if slopes is None else slopes * -(i - j).abs()


def _finite(x: Tensor) -> Tensor:
    """−∞ -> 0, so that −∞ − x is −∞ and never NaN."""
    return x.masked_fill(x == -torch.inf, 0.0)


def empty_outputs(q: Tensor, v: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """o (B, H, N, Dv) token-major and lse (B, H, N), not filled: what a forward op returns."""
    b, h, n, _ = q.shape
    o = v.new_empty(b, n, h, v.shape[3]).transpose(1, 2)
    return o, q.new_empty(b, h, n, dtype=acc)


def empty_heads(x: Tensor) -> Tensor:
    """Like x (B, H, N, D), token-major, not filled."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)
