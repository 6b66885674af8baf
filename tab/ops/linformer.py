"""Linformer: K and V projected along the sequence to K rows, then full attention on those.

    o = softmax(scale · q K'ᵀ) V',   K' = Eᵀ k,  V' = Fᵀ v

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", eq. 7. A composition of
PyTorch's own operators: two small matrix products and scaled_dot_product_attention.
"""

from __future__ import annotations

from torch import Tensor

from ._check import (
    Layout,
    accumulate,
    as_given,
    check_key_mask,
    check_qkv,
    heads_first,
    operands,
    real,
    same,
    shapes,
)
from ._sdpa import sdpa
from ._softmax import score_scale


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    E: Tensor,
    F: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    layout: Layout = "bhnd",
) -> Tensor:
    """Attention on a sequence projected from N to K rows, `o = softmax(scale·q (Eᵀk)ᵀ) Fᵀv`
    (Wang et al. 2020, eq. 7).

    Args:
        q: (B, H, N, D); k: (B, H, N_k, D); v: (B, H, N_k, Dv). One floating dtype, one device. N_k
            may be another than N (cross-attention).
        E: (N_max, K), or (H, N_max, K) for one per head; projects k, its first N_k rows are used.
        F: the same for v; E by default.
        key_mask: (B, N_k) bool, True where a token is real; the others are zero in Eᵀk and Fᵀv,
            whatever they hold. Where N_k = N, an infinite or NaN q of theirs counts as 0, so that
            it reaches nobody in the backward pass either.
        scale: of the scores, D^(-1/2) by default.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.

    Returns:
        o (B, H, N, Dv) in the input's dtype.

    Raises:
        ValueError: N_k > N_max, or shapes, dtypes or devices do not fit; the message prints them.
        TypeError: scale is a tensor.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> E = torch.randn(64, 16) / 8  # N_max = 64 tokens to K = 16 rows
        >>> tab.linformer_attention(q, k, v, E).shape
        torch.Size([2, 4, 64, 32])
    """
    q, k, v = heads_first("linformer_attention", layout, q, k, v)
    q, k, v = check_qkv("linformer_attention", q, k, v, cross=True, layout=layout)
    (E,) = operands("linformer_attention", E=E)
    F = E if F is None else operands("linformer_attention", F=F)[0]
    check_key_mask("linformer_attention", key_mask, k)
    same("linformer_attention", layout, q=q, E=E, F=F)
    for x in (E, F):
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] not in (1, q.shape[1])):
            raise ValueError(
                "linformer_attention wants E, F (N_max, K) or (H, N_max, K), got "
                f"{shapes(layout, q=q)}, {shapes(E=E, F=F)}"
            )
    if E.shape[-1] != F.shape[-1] or 0 in E.shape:
        raise ValueError(f"linformer_attention wants E, F of one K ≥ 1, got {shapes(E=E, F=F)}")
    n, longest = k.shape[2], min(E.shape[-2], F.shape[-2])
    if n > longest:
        raise ValueError(
            f"linformer_attention: N = {n} keys, but E and F have rows for N_max = {longest}; "
            "shorten the sequence or build E and F with more rows"
        )
    scale = score_scale("linformer_attention", scale, q.shape[-1])
    k, v = real(key_mask, k, v)
    short_k = E.narrow(-2, 0, n).mT @ k  # (B, H, K, D)
    short_v = F.narrow(-2, 0, n).mT @ v  # (B, H, K, Dv)
    if key_mask is not None and n == q.shape[2]:
        q = _without_wild(q, short_k, key_mask)
    return as_given(layout, sdpa(q, short_k, short_v, scale))


def _without_wild(q: Tensor, k: Tensor, key_mask: Tensor) -> Tensor:
    """q, 0 where a token is masked and its scores are not finite for sure: such a row would give
    NaN to E, k and v in the backward pass, 0·NaN, even if nobody used its output."""
    size = q.detach().abs().amax(-1, keepdim=True).to(accumulate(q))  # (B, H, N, 1)
    most = size * k.detach().abs().amax((-2, -1), keepdim=True) * q.shape[-1]  # of |q·k|
    return q.masked_fill(~key_mask[:, None, :, None] & ~most.isfinite(), 0.0)
