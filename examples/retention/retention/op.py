"""Retention: causal linear attention whose state decays, each head at a rate of its own.

    S_t = γ_h S_{t-1} + k_t v_tᵀ,  o_t = q_tᵀ S_t,  that is  o = ((Q Kᵀ) ∘ D) V,  D_ij = γ_h^(i-j)

Sun et al. 2023, "Retentive Network", eq. 5-7, without rotary positions. There is no denominator:
the layer normalises. Read top to bottom: reference → ops → autograd → public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tab.ops import Op, accumulate, check_qkv, choose, token_major

CHUNK = 64  # tokens whose scores the reference holds at once

# --- reference ------------------------------------------------------------------------------------


def forward_reference(q, k, v, gamma) -> Tensor:
    """q, k (B, H, N, D), v (B, H, N, Dv), gamma H numbers -> o (B, H, N, Dv). Sums run in float32,
    or in float64 where the inputs are."""
    if q.is_meta:  # shapes alone
        return _like(v)
    acc, outs, state = accumulate(q), [], 0.0
    log = torch.tensor(gamma, dtype=acc, device=q.device).log()[:, None, None]  # (H, 1, 1)
    chunks = (x.to(acc).split(CHUNK, 2) for x in (q, k, v))
    for cq, ck, cv in zip(*chunks, strict=True):  # (B, H, T, ·)
        i = torch.arange(cq.shape[2], dtype=acc, device=q.device)[:, None]  # (T, 1)
        scores = (cq @ ck.mT) * (log * (i - i.mT)).exp()
        out = _lower(scores, cv)
        if isinstance(state, Tensor):
            out = out + (cq * (log * (i + 1)).exp()) @ state
        new = (ck * (log * (len(i) - 1 - i)).exp()).mT @ cv  # (B, H, D, Dv)
        state = new + (log * len(i)).exp() * state
        outs.append(out)
    return token_major(torch.cat(outs, 2).to(v.dtype))


def _lower(scores: Tensor, v: Tensor) -> Tensor:
    """Σ_{j≤i} scores_ij v_j. 0 · NaN is NaN: what is not finite in v is left out of the product,
    and counts as NaN from its own row on, so that no earlier row meets it."""
    return scores.tril() @ v.nan_to_num(0.0, 0.0, 0.0) + (v - v).cumsum(-2)


def backward_reference(do, q, k, v, gamma) -> tuple[Tensor, Tensor, Tensor]:
    """Each gradient is a retention itself, forwards or backwards in time: with P = (do Vᵀ) ∘ D,
    dQ = P K, dK = Pᵀ Q and dV = ((Q Kᵀ) ∘ D)ᵀ do."""
    if q.is_meta:
        return _like(q), _like(k), _like(v)

    def later(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """((A Bᵀ) ∘ Dᵀ) C: every token looks at those that come after it."""
        return forward_reference(a.flip(2), b.flip(2), c.flip(2), gamma).flip(2)

    dq = forward_reference(do, v, k, gamma)
    return dq, token_major(later(v, do, q)), token_major(later(k, q, do))


def _like(x: Tensor) -> Tensor:
    """As `token_major` lays it out."""
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, *_, **__) -> int:
    """k vᵀ and qᵀS: 4·D·Dv a token and head."""
    b, h, n, d = q
    return 4 * b * h * n * d * v[-1]


def _backward_flops(do, q, k, v, *_, **__) -> int:
    """Three retentions."""
    return 3 * _flops(q, k, v)


retention_fwd = Op(
    "retention_fwd",
    "(Tensor q, Tensor k, Tensor v, float[] gamma) -> Tensor o",
    forward_reference,
    flops=_flops,
)
retention_bwd = Op(
    "retention_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, float[] gamma) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_reference,
    flops=_backward_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, o, gamma):
    (do,) = grads  # None where nothing depends on o
    return () if do is None else retention_bwd.below(backend, do, q, k, v, gamma)


retention_fwd.differentiable(_gradients, by=retention_bwd)

# --- public ---------------------------------------------------------------------------------------


def rates(heads: int) -> list[float]:
    """γ_h = 1 − 2^(−5−h), the paper's."""
    return [1 - 2.0 ** (-5 - h) for h in range(heads)]


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gamma: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Retention, `o_i = Σ_{j≤i} γ_h^(i−j) (q_iᵀk_j) v_j` (Sun et al. 2023, eq. 5).

    Args:
        q, k: (B, H, N, D); v: (B, H, N, Dv), of one floating dtype and on one device.
        gamma: a number in (0, 1] for each head, by default 1 − 2^(−5−h). It gets no gradient.
        backend: "auto" or "reference", until the op has kernels.

    Returns:
        o (B, H, N, Dv) in the input's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or gamma is no such list.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    q, k, v = check_qkv("retention", q, k, v)
    heads = q.shape[1]
    gamma = rates(heads) if gamma is None else [float(x) for x in gamma]
    if len(gamma) != heads or not all(0 < x <= 1 for x in gamma):
        raise ValueError(
            f"retention wants gamma, a number in (0, 1] for each of {heads} heads, got {gamma}"
        )
    backend = choose(backend, retention_fwd, q, k, v)
    return retention_fwd.apply(backend, q, k, v, gamma)
