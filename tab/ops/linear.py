"""Linear attention: the softmax kernel replaced by a feature map, so that the keys sum up once.

    o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + ε),  S = Σ_j φ(k_j) v_jᵀ,  z = Σ_j φ(k_j);  causal: over j ≤ i

Katharopoulos et al. 2020, "Transformers are RNNs", eq. 4-5 (bidirectional) and 9-12 (causal).
Read top to bottom: reference → ops → autograd → public function. The kernels beside the reference:
csrc/cpu/linear/, kernels/linear.py and csrc/cuda/linear/.

The reference appends a column of ones to v: then S carries z as its last column, and the last
column of φ(q)ᵀS is the denominator. A row whose denominator is 0 gives 0 and passes no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import (
    accumulate,
    answered,
    check_key_mask,
    check_qkv,
    number,
    real,
    same,
    shapes,
    token_major,
)
from ._op import Op, choose
from ._tile import empty_heads

FEATURE_MAPS = {"elu1": 0, "relu": 1, "identity": 2}  # code passed to the kernels
CHUNK = 64  # tokens whose causal scores the reference holds at once
BLOCK = 1024  # tokens that the reference adds up in one running sum

# --- reference ------------------------------------------------------------------------------------


def feature(x: Tensor, feature_map: int) -> Tensor:
    """φ(x)"""
    if feature_map == 0:
        return F.elu(x) + 1
    return F.relu(x) if feature_map == 1 else x


def feature_slope(x: Tensor, feature_map: int) -> Tensor:
    """φ'(x)"""
    if feature_map == 0:
        return torch.where(x > 0, torch.ones_like(x), x.exp())
    return (x > 0).to(x.dtype) if feature_map == 1 else torch.ones_like(x)


def with_ones(v: Tensor) -> Tensor:
    """(…, Dv) -> (…, Dv+1)"""
    return F.pad(v, (0, 1), value=1.0)


def join(s: Tensor | None, z: Tensor | None) -> Tensor | float:
    """S (B, H, D, Dv) and z (B, H, D) as one (B, H, D, Dv+1); 0 where there are none."""
    return 0.0 if s is None else torch.cat([s, z[..., None]], -1)


def chunks(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, H, ⌈N/CHUNK⌉, CHUNK, D), padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % CHUNK)).unflatten(-2, (-1, CHUNK))


def merge(x: Tensor, n: int) -> Tensor:
    """The inverse of `chunks`."""
    return x.flatten(2, 3)[:, :, :n]


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Over dim 2 of x (B, H, c, D, Dv+1). Not cumsum − x: that leaks later tokens by rounding."""
    return F.pad(x.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))


def lower(scores: Tensor, v: Tensor) -> Tensor:
    """Σ_{j≤i} scores_ij v_j. A NaN or ∞ in v, which 0 · would not hide from earlier rows, counts as
    NaN from its own row on."""
    return scores.tril() @ v.nan_to_num(0.0, 0.0, 0.0) + (v - v).cumsum(-2)


def token_sum(x: Tensor, y: Tensor) -> Tensor:
    """xᵀy over the tokens, (B, H, N, D) and (B, H, N, E) -> (B, H, D, E), in blocks: one float32
    running sum over 2²⁰ equal terms was 0.5 % off."""
    if x.shape[2] <= BLOCK:
        return x.mT @ y
    x, y = (F.pad(t, (0, 0, 0, -t.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)) for t in (x, y))
    return (x.mT @ y).sum(2)


def _operands(q, k, v, key_mask, feature_map):
    """φ(q), φ(k) with masked tokens at 0, and v with its ones, all in the accumulation type."""
    acc = accumulate(q)
    k, v = real(key_mask, k, v)
    fq, fk = feature(q.to(acc), feature_map), feature(k.to(acc), feature_map)  # (B, H, N, D)
    (fk,) = real(key_mask, fk)
    return fq, fk, with_ones(v.to(acc))  # (B, H, N, Dv+1)


def _sums(fq, fk, v1, state, causal, total=None):
    """φ(q)ᵀ[S z] (B, H, N, Dv+1), the state each chunk (or everyone) sees, and the final state,
    which is not summed again when `total` gives it."""
    if not causal:
        total = token_sum(fk, v1) + state if total is None else total  # (B, H, D, Dv+1)
        return fq @ total, total, total
    cq, ck, cv = chunks(fq), chunks(fk), chunks(v1)
    sums = ck.mT @ cv  # (B, H, c, D, Dv+1)
    total = sums.sum(2) + state if total is None else total
    state = state[:, :, None] if isinstance(state, Tensor) else state
    before = exclusive_cumsum(sums) + state
    out = cq @ before + lower(cq @ ck.mT, cv)
    return merge(out, fq.shape[2]), before, total


def _inverse(den: Tensor) -> Tensor:
    """1/den, 0 where den is 0; replaced before it divides, for 1/0 has the gradient NaN."""
    nothing = den == 0
    return (1 / den.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def forward_reference(q, k, v, key_mask, s0, z0, feature_map, causal, eps):
    """-> o (B, H, N, Dv), S (B, H, D, Dv), z (B, H, D), the two last in the accumulation type."""
    if q.is_meta:  # shapes need no chunks, and so no guards on N
        z = q.new_empty(*q.shape[:2], q.shape[3], dtype=accumulate(q))
        return empty_heads(v), z.new_empty(*z.shape, v.shape[3]), z
    fq, fk, v1 = _operands(q, k, v, key_mask, feature_map)
    out, _, total = _sums(fq, fk, v1, join(s0, z0), causal)
    o = out[..., :-1] * _inverse(out[..., -1:] + eps)
    return token_major(o.to(v.dtype)), total[..., :-1].contiguous(), total[..., -1].contiguous()


def backward_reference(do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, feature_map, causal, eps):
    """-> dq, dk, dv, dS₀, dz₀; o, S, z are the forward pass's.
    With g = do/den, r = -g·o, g' = [g r], v' = [v 1], T = [S z]:

    dφ(q_i) = T_i g'_i,  dT_j = dT_N + Σ_{i≥j} φ(q_i) g'_iᵀ,
    dφ(k_j) = dT_j v'_j,  dv'_j = dT_jᵀ φ(k_j)
    """
    if q.is_meta:
        return *map(empty_heads, (q, k, v)), torch.empty_like(s), torch.empty_like(z)
    acc, n = accumulate(q), q.shape[2]
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    fq, fk, v1 = _operands(q, k, v, key_mask, feature_map)
    out, before, _ = _sums(fq, fk, v1, join(s0, z0), causal, join(s, z))
    g = do.to(acc) * _inverse(out[..., -1:] + eps)
    g1 = torch.cat([g, -(g * o.to(acc)).sum(-1, keepdim=True)], -1)  # (B, H, N, Dv+1)
    last = join(ds, dz)
    if causal:
        cq, ck, cv, cg = chunks(fq), chunks(fk), chunks(v1), chunks(g1)
        sums = cq.mT @ cg  # (B, H, c, D, Dv+1)
        last = last[:, :, None] if isinstance(last, Tensor) else last
        after = exclusive_cumsum(sums.flip(2)).flip(2) + last
        scores, dscores = (cq @ ck.mT).tril(), (cg @ cv.mT).tril()
        dfq = merge(cg @ before.mT + dscores @ ck, n)
        dfk = merge(cv @ after.mT + dscores.mT @ cq, n)
        dv1 = merge(ck @ after + scores.mT @ cg, n)
        first = after[:, :, 0] + sums[:, :, 0]
    else:
        first = token_sum(fq, g1) + last  # (B, H, D, Dv+1)
        dfq, dfk, dv1 = g1 @ before.mT, v1 @ first.mT, fk @ first
    (dfk,) = real(key_mask, dfk)
    dq = dfq * feature_slope(q.to(acc), feature_map)
    dk = dfk * feature_slope(k.to(acc), feature_map)
    grads = (x.to(like.dtype) for x, like in ((dq, q), (dk, k), (dv1[..., :-1], v)))
    return *map(token_major, grads), first[..., :-1].contiguous(), first[..., -1].contiguous()


# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, *_, **__) -> int:
    """S = φ(k)ᵀv and φ(q)ᵀS: 4·D·Dv a token and head."""
    b, h, n, d = q
    return 4 * b * h * n * d * v[-1]


def _backward_flops(do, ds, dz, q, k, v, *_, **__) -> int:
    """dS = φ(q)ᵀdo, and do, v and φ(k) by S or dS: 8·D·Dv a token and head."""
    b, h, n, d = q
    return 8 * b * h * n * d * v[-1]


linear_fwd = Op(
    "linear_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? s0, Tensor? z0, "
    "int feature_map, bool causal, float eps) -> (Tensor o, Tensor s, Tensor z)",
    forward_reference,
    flops=_flops,
)
linear_bwd = Op(
    "linear_bwd",
    "(Tensor do, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor o, Tensor s, "
    "Tensor z, Tensor? key_mask, Tensor? s0, Tensor? z0, int feature_map, bool causal, float eps) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds0, Tensor dz0)",
    backward_reference,
    flops=_backward_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, key_mask, s0, z0, o, s, z, *options):
    do, ds, dz = grads
    do = torch.zeros_like(o) if do is None else do
    if (ds is None) != (dz is None):  # the ops take both or none
        ds = torch.zeros_like(s) if ds is None else ds
        dz = torch.zeros_like(z) if dz is None else dz
    dq, dk, dv, ds0, dz0 = linear_bwd.below(
        backend, do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, *options
    )
    return (dq, dk, dv) if s0 is None else (dq, dk, dv, None, ds0, dz0)


linear_fwd.differentiable(_gradients, by=linear_bwd)

# --- public ---------------------------------------------------------------------------------------


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    causal: bool = False,
    key_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Linear attention, `o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + eps)` (Katharopoulos 2020, eq. 5, 9).

    Args:
        q, k: (B, H, N, D); v: (B, H, N, Dv). One of float16, bfloat16, float32 and float64 (under
            autocast they are cast first; float64 stays), one device. Sums run in float32. B and N
            may be 0: outputs are empty, and the state stays the initial one.
        feature_map: "elu1" (elu + 1), "relu", "identity" (q and k are features already) or
            "softmax" (of each q over D, of k over the tokens; Shen et al. 2021; not causal).
        causal: token i sees tokens j ≤ i.
        key_mask: (B, N) bool, True where a token is real; the others vanish from S and from z.
            What a masked token holds, NaN and inf included, reaches no other token; a NaN in a real
            token is seen in every output that attends to it.
        initial_state: (S (B, H, D, Dv), z (B, H, D)) float32, from earlier tokens.
        return_state: also return the state after the last token.
        eps: added to the denominator. A row whose denominator is 0 gives 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, (S, z)).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: eps is a tensor, whose gradient would be lost.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    q, k, v = check_qkv("linear_attention", q, k, v)
    check_key_mask("linear_attention", key_mask, k)
    eps = number("linear_attention", "eps", eps)
    s0, z0 = _check_state(q, v, initial_state)
    if feature_map == "softmax":
        if causal or initial_state is not None:
            raise ValueError(
                'feature_map="softmax" normalises k over all tokens: it has no causal form and '
                'takes no initial_state; use "elu1" or "relu"'
            )
        q, k = q.softmax(-1), _softmax_tokens(k, key_mask)
        feature_map = "identity"
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map={feature_map!r}: choose one of {', '.join(FEATURE_MAPS)}, softmax "
            '(a learned map is applied by the layer "linear")'
        )
    backend = choose(backend, linear_fwd, q, k, v)
    options = FEATURE_MAPS[feature_map], bool(causal), eps
    o, s, z = linear_fwd.apply(backend, q, k, v, key_mask, s0, z0, *options)
    return (o, (s, z)) if return_state else o


def _softmax_tokens(k: Tensor, key_mask: Tensor | None) -> Tensor:
    if key_mask is None:
        return k.softmax(-2)
    hidden = ~key_mask[:, None, :, None]
    # A row of nothing but padding would be 0/0.
    return k.masked_fill(hidden, -torch.inf).softmax(-2).masked_fill(hidden, 0.0)


def _check_state(q: Tensor, v: Tensor, state) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    s, z = state
    b, h, _, d = q.shape
    acc = accumulate(q)
    if s.shape != (b, h, d, v.shape[-1]) or z.shape != (b, h, d) or {s.dtype, z.dtype} != {acc}:
        raise ValueError(
            f"linear_attention wants initial_state (S {(b, h, d, v.shape[-1])}, z {(b, h, d)}) in "
            f"{str(acc).removeprefix('torch.')}, got {shapes(S=s, z=z)}"
        )
    same("linear_attention", S=s, z=z, q=q.to(acc) if q.dtype != acc else q)
    return s.contiguous(), z.contiguous()
