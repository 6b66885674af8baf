"""The forms of multi-head latent attention that compose PyTorch's operators, and what they share.

"expand" writes K_h = W_uk,h c and V_h = W_uv,h c for every head. "absorb" moves both matrices to
the query's side, q̃_h = W_uk,hᵀ q_n,h and o_h = W_uv,h z_h, and attends among the latents: one key
and value head for all (DeepSeek-V2 2024, appendix C). Both run SDPA and differentiate by autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import accumulate, full_precision, same, shapes, token_major
from ._op import Op
from ._sdpa import sdpa, written
from ._softmax import quiet

_NAMES = "q_nope", "q_rope", "c_kv", "k_rope", "w_uk", "w_uv"
CHUNK = 256  # queries whose scores `max_logits` holds at once


def check_latents(op, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *, one_query=False, layout="bhnd"):
    """Ranks, sizes that belong together, one dtype, one device."""
    tensors = q_nope, q_rope, c_kv, k_rope, w_uk, w_uv
    rule, rows = None, "B, H, N" if layout == "bhnd" else "B, N, H"
    if [x.dim() for x in tensors] != [4, 4, 3, 3, 3, 3]:
        rule = (
            f"q_nope ({rows}, Dn), q_rope ({rows}, Dr), c_kv (B, N, R), k_rope (B, N, Dr), "
            "w_uk (H, Dn, R), w_uv (H, Dv, R)"
        )
    else:
        given = [x.shape for x in tensors]
        (b, h, n, dn), dr, r, dv = given[0], given[1][3], given[2][2], given[5][1]
        keys = given[2][1] if one_query else n
        fit = [(b, h, n, dn), (b, h, n, dr), (b, keys, r), (b, keys, dr), (h, dn, r), (h, dv, r)]
        if given != fit:
            every = zip(_NAMES, given, fit, strict=True)
            wrong = [
                f"{name} {_given(size, layout)}" for name, found, size in every if found != size
            ]
            rule = f"{', '.join(wrong)} to fit the others"
        elif not (h and dn and r and dv):
            rule = "no empty dimension but B, N and Dr"
    named = dict(zip(_NAMES, tensors, strict=True))
    if rule:
        raise ValueError(f"{op} wants {rule}; got {shapes(layout, **named)}")
    same(op, layout, **named)


def _given(size, layout):
    """A size (B, H, N, ·) as the caller writes it."""
    return size if layout == "bhnd" or len(size) == 3 else (size[0], size[2], size[1], size[3])


def visible(key_mask: Tensor | None, n: int, causal: bool, device: torch.device) -> Tensor | None:
    """True where query i sees key j: (B, N, N), (N, N), or None for everywhere."""
    seen = None if key_mask is None else key_mask[:, None, :].expand(-1, n, -1)
    if causal:
        earlier = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        seen = earlier if seen is None else seen & earlier
    return seen


def real_tokens(key_mask: Tensor | None, *latents: Tensor) -> tuple[Tensor, ...]:
    """The latents (B, N, ·) with 0 for whatever a masked token holds: 0·NaN would be NaN."""
    if key_mask is None:
        return latents
    return tuple(x.masked_fill(~key_mask[..., None], 0.0) for x in latents)


def expand(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    """-> q (B, H, N, Dn+Dr), k (B, H, N, Dn+Dr), v (B, H, N, Dv)"""
    c = c_kv.unsqueeze(1)  # (B, 1, N, R)
    shared = k_rope.unsqueeze(1).expand(-1, q_nope.shape[1], -1, -1)
    q, k = torch.cat([q_nope, q_rope], -1), torch.cat([c @ w_uk.mT, shared], -1)
    return q, k, c @ w_uv.mT


def absorb(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    """-> q (B, H, N, R+Dr), k (B, 1, N, R+Dr), v (B, 1, N, R): the latents are keys and values."""
    q = torch.cat([q_nope @ w_uk, q_rope], -1)
    return q, torch.cat([c_kv, k_rope], -1).unsqueeze(1), c_kv.unsqueeze(1)


def compose(form: str, operands, scale, causal, key_mask, want_lse, want_peak):
    """-> o (B, H, N, Dv), lse (B, H, N) or None, max_logits (B, H) or None.

    SDPA gives no lse: where that is wanted, the scores (B, H, N, N) are written. lse and max_logits
    are of scores that are float32 throughout, whatever the type of the input.
    """
    project = expand if form == "expand" else absorb
    options: dict[str, Any] = {"causal": causal}
    if key_mask is not None:
        queries = (quiet(key_mask, x) for x in operands[:2])
        operands = *queries, *real_tokens(key_mask, *operands[2:4]), *operands[4:]
        seen = visible(key_mask, operands[0].shape[2], causal, key_mask.device)
        assert seen is not None
        options = {"seen": seen[:, None]}  # (B, 1, N, N)
    lse = peak = None
    if want_lse or want_peak:
        acc, dtype = accumulate(operands[0]), operands[0].dtype
        with full_precision(operands[0]):
            exact = [x.to(acc) for x in operands]
            q, k, v = project(*exact)
            if want_peak:
                peak = max_logits(q, k, scale, causal=causal, key_mask=key_mask)
            if want_lse:
                o, lse = written(q, k, v, scale, **options)
                o = o if form == "expand" else o @ exact[5].mT
                return token_major(o.to(dtype)), lse, peak
    q, k, v = project(*operands)
    if form == "expand":
        return sdpa(q, k, v, scale, **options), lse, peak
    z = sdpa(q, k, v, scale, merged=False, **options)
    return token_major(z @ operands[5].mT), lse, peak


# --- the largest score ----------------------------------------------------------------------------


def max_logits_reference(q, k, key_mask, scale, causal):
    """-> (B, H) in the accumulation type, −∞ where no pair counts; no N×N scores."""
    acc, n = accumulate(q), q.shape[2]
    peak = q.new_full(q.shape[:2], -torch.inf, dtype=acc)
    if q.is_meta:  # shapes need no walk
        return peak
    k, j = k.to(acc).mT, torch.arange(n, device=q.device)
    for start in range(0, n, CHUNK):
        i = j[start : start + CHUNK]
        s = q[:, :, i].to(acc) @ k * scale  # (B, H, CHUNK, N)
        if causal:
            s = s.masked_fill(j > i[:, None], -torch.inf)
        if key_mask is not None:
            both = key_mask[:, i, None] & key_mask[:, None]  # (B, CHUNK, N)
            s = s.masked_fill(~both[:, None], -torch.inf)
        peak = peak.maximum(s.amax((-2, -1)))
    return peak


def _flops(q, k, *_, **__) -> int:
    """All scores."""
    b, h, n, d = q
    return 2 * b * h * n * n * d


# An op, so that torch.compile does not unroll the walk: one compilation serves every length.
max_logits_op = Op(
    "max_logits",
    "(Tensor q, Tensor k, Tensor? key_mask, float scale, bool causal) -> Tensor",
    max_logits_reference,
    flops=_flops,
)


@torch.no_grad()
def max_logits(
    q: Tensor, k: Tensor, scale: float, *, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The largest scale·q_i·k_j with j visible to i and both real tokens, (B, H), no gradient.

    q (B, H, N, D), k (B, H or 1, N, D), key_mask (B, N).
    """
    return max_logits_op("auto", q.detach(), k.detach(), key_mask, scale, causal)
