"""FAVOR+: softmax attention in M positive random features, so that the keys sum up once.

    o_i = Σ_m e^(w_m·q̂_i) S_m / Σ_m e^(w_m·q̂_i) z_m,   x̂ = x·D^(-1/4),
    S_m = Σ_j e^(a_jm) v_j,  z_m = Σ_j e^(a_jm),  a_jm = w_m·k̂_j - ‖k̂_j‖²/2;  causal: over j ≤ i

Choromanski et al. 2021, "Rethinking Attention with Performers", eq. 7 and lemma 1; the factors
M^(-1/2) and e^(-‖q̂‖²/2) cancel. Kernel "relu": relu(w_m·x̂) in place of both exponentials.

No ε: the state is held relative to a shift, c_m = max_j a_jm, so that e^(a_jm - c_m) ≤ 1 and
z_m ≥ 1, and the query's exponent is w_m·q̂ + c_m minus its maximum over m, so the denominator is
≥ 1. The shifts cancel from o: they are exact and carry no gradient. They are taken per batch entry,
head and feature, and when causal over j ≤ i only: a later key changes nothing earlier.

Read top to bottom: features → reference → ops → autograd → public function. Symbols: spelled
out, b_im = w_m·q̂_i, `v1` is [v 1], a state `t` is [S z], and e^lse_i = e^(shift)·(denominator + ε).
"""

from __future__ import annotations

from collections.abc import Iterator

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
from .linear import join, token_sum, with_ones

KERNELS = {"softmax": 0, "relu": 1}  # code passed to the kernels
WIDE = 64  # block length from which the causal reference multiplies keys and values first

# --- features -------------------------------------------------------------------------------------


def finite(shift: Tensor) -> Tensor:
    """-inf, the shift of a state that has seen nothing, as 0: e^(-inf - 0) = 0, not NaN."""
    return shift.masked_fill(shift == -torch.inf, 0.0)


def exponents(q, k, w, key_mask, kernel) -> tuple[Tensor, Tensor]:
    """b, a (B, H, N, M); a is -inf where a key is masked."""
    acc, scale = accumulate(q), q.shape[-1] ** -0.25
    qh, kh = q.to(acc) * scale, k.to(acc) * scale  # (B, H, N, D)
    b, a = qh @ w.mT, kh @ w.mT
    if kernel == 0:
        a = a - kh.square().sum(-1, keepdim=True) / 2
    if key_mask is not None:
        a = a.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    return b, a


def key_features(a: Tensor, shift: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """φ = e^(a - shift) (or relu(a)) and dφ/da"""
    if kernel == 1:
        return F.relu(a), (a > 0).to(a.dtype)
    phi = (a - finite(shift)).exp()
    return phi, phi


def query_features(b: Tensor, shift: Tensor, norm: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """φ = e^(b + shift - norm) (or relu(b)·e^-norm) and dφ/db. A state at -inf is not read."""
    if kernel == 1:
        return F.relu(b) * (-norm).exp(), (b > 0) * (-norm).exp()
    phi = (b + shift - norm).exp()
    return phi, phi


def rescale(before: Tensor, after: Tensor, kernel: int) -> Tensor:
    """(B, H, 1, M) shifts -> the factor (B, H, M, 1) that moves a state from one to the other."""
    factor = torch.ones_like(after) if kernel == 1 else (before - finite(after)).exp()
    return factor.mT


# --- reference ------------------------------------------------------------------------------------
# Causal sums in log₂N levels instead of N steps: at level h, in each block of 2h tokens, the
# queries of the right half read the keys of the left half at that half's own shift. Every pair
# j < i meets at exactly one level, nothing ever overflows, and no shift knows a later key.


def levels(n: int) -> Iterator[int]:
    h = 1
    while h < n:
        yield h
        h *= 2


def halves(x: Tensor, h: int, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """(B, H, N, ·) -> left and right halves (B, H, ⌈N/2h⌉, h, ·) of its blocks of 2h tokens."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % (2 * h)), value=fill).unflatten(2, (-1, 2, h)).unbind(3)


def to_left(x: Tensor, n: int) -> Tensor:
    """The inverse of `halves`: (B, H, N, ·) with x (B, H, ⌈N/2h⌉, h, ·) in left halves, else 0."""
    return F.pad(x, (0, 0, 0, x.shape[3])).flatten(2, 3)[:, :, :n]


def to_right(x: Tensor, n: int) -> Tensor:
    return F.pad(x, (0, 0, x.shape[3], 0)).flatten(2, 3)[:, :, :n]


def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x yᵀ z, in the cheaper order; the rows are tokens."""
    return x @ (y.mT @ z) if x.shape[-2] > WIDE else (x @ y.mT) @ z


def _causal_sums(b, a, v1, r, kernel):
    """Σ_{j≤i} Σ_m e^(b_im + a_jm - r_i) v1_j, (B, H, N, Dv+1)"""
    n = a.shape[2]
    own = a.detach()
    fq, fk = query_features(b, own, r, kernel)[0], key_features(a, own, kernel)[0]
    out = (fq * fk).sum(-1, keepdim=True) * v1  # j = i
    for h in levels(n):
        left, right = halves(a, h, -torch.inf)[0], halves(b, h, -torch.inf)[1]
        shift = left.amax(-2, keepdim=True).detach()
        fk = key_features(left, shift, kernel)[0]
        fq = query_features(right, shift, halves(r, h)[1], kernel)[0]
        out = out + to_right(product(fq, fk, halves(v1, h)[0]), n)
    return out


def _causal_gradients(b, a, v1, g1, lse, kernel):
    """The gradients of Σ_i g1_i·(causal sum)_i in b, a and v1."""
    n = a.shape[2]
    (fq, sq), (fk, sk) = query_features(b, a, lse, kernel), key_features(a, a, kernel)
    pair = (g1 * v1).sum(-1, keepdim=True)  # (B, H, N, 1)
    db, da, dv1 = pair * fk * sq, pair * fq * sk, (fq * fk).sum(-1, keepdim=True) * g1
    for h in levels(n):
        left, right = halves(a, h, -torch.inf)[0], halves(b, h, -torch.inf)[1]
        v, g = halves(v1, h)[0], halves(g1, h)[1]
        shift = left.amax(-2, keepdim=True)
        fk, sk = key_features(left, shift, kernel)
        fq, sq = query_features(right, shift, halves(lse, h)[1], kernel)
        db = db + to_right(product(g, v, fk) * sq, n)
        da = da + to_left(product(v, g, fq) * sk, n)
        dv1 = dv1 + to_left(product(fk, fq, g), n)
    return db, da, dv1


def _initial(s0, z0, c0, a, dv, kernel):
    """[S z] (B, H, M, Dv+1) and its shift (B, H, 1, M); empty where none is given."""
    if s0 is not None:
        return join(s0, z0), c0[:, :, None]
    empty = 0.0 if kernel == 1 else -torch.inf
    b, h, _, m = a.shape
    return a.new_zeros(b, h, m, dv + 1), a.new_full((b, h, 1, m), empty)


def forward_reference(q, k, v, projection, key_mask, s0, z0, c0, kernel, causal, eps):
    """-> o (B, H, N, Dv), S (B, H, M, Dv), z, c (B, H, M), lse (B, H, N)"""
    if q.is_meta:  # shapes need no levels, and so no guards on N
        lse = torch.empty(q.shape[:3], dtype=accumulate(q), device=q.device)
        z = lse.new_empty(*q.shape[:2], projection.shape[0])
        return empty_heads(v), z.new_empty(*z.shape, v.shape[3]), z, torch.empty_like(z), lse
    k, v = real(key_mask, k, v)
    b, a = exponents(q, k, projection, key_mask, kernel)  # (B, H, N, M)
    v1 = with_ones(v.to(b.dtype))  # (B, H, N, Dv+1)
    t0, shift0 = _initial(s0, z0, c0, a, v.shape[-1], kernel)
    if kernel == 1:
        last, r = shift0, torch.zeros_like(b[..., :1])
    else:
        seen = torch.cat([shift0, a], 2).detach()
        last = seen.amax(2, keepdim=True)  # (B, H, 1, M)
        c = seen.cummax(2).values[:, :, 1:] if causal else last  # what query i may know
        r = finite((b + c).amax(-1, keepdim=True)).detach()  # (B, H, N, 1)
    total = token_sum(key_features(a, last, kernel)[0], v1) + rescale(shift0, last, kernel) * t0
    if causal:
        out = query_features(b, shift0, r, kernel)[0] @ t0 + _causal_sums(b, a, v1, r, kernel)
    else:
        out = query_features(b, last, r, kernel)[0] @ total
    den = out[..., -1:] + eps  # (B, H, N, 1)
    nothing = den == 0
    # A denominator that is 0 is replaced before it divides: 0/0 would have the gradient NaN.
    o = (out[..., :-1] / den.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
    lse = (r + den.log()).masked_fill(nothing, torch.inf).squeeze(-1).detach()
    s, z = total[..., :-1].contiguous(), total[..., -1].contiguous()
    return token_major(o.to(v.dtype)), s, z, last.squeeze(2).clone(), lse


def backward_reference(
    do, ds, dz, q, k, v, projection, o, s, z, c, lse, key_mask, s0, z0, c0, kernel, causal
):
    """-> dq, dk, dv, dS₀, dz₀; the last two are of size 0 without an initial state. Features are
    made again, the query's already divided by the denominator (norm = lse), so with
    g' = [do, -do·o] and T = [S z] at shift c:

    dφ(q_i) = T g'_i,  dT = dT_N + Σ_i φ(q_i) g'_iᵀ,  dφ(k_j) = dT v'_j,  dv'_j = dTᵀ φ(k_j);
    db = dφ(q)∘φ', da = dφ(k)∘φ';  dq̂ = db W,  dk̂ = da W - (Σ_m da_m) k̂.
    """
    if q.is_meta:
        first = (torch.empty_like(x) if s0 is not None else x.new_empty(0) for x in (s, z))
        return *map(empty_heads, (q, k, v)), *first
    (q, o), (k, v) = answered(key_mask, do, q, o), real(key_mask, k, v)
    b, a = exponents(q, k, projection, key_mask, kernel)
    acc, scale = b.dtype, q.shape[-1] ** -0.25
    v1, (lse,) = with_ones(v.to(acc)), answered(key_mask, do, lse[..., None], fill=torch.inf)
    do = do.to(acc)
    g1 = torch.cat([do, -(do * o.to(acc)).sum(-1, keepdim=True)], -1)  # (B, H, N, Dv+1)
    t0, shift0 = _initial(s0, z0, c0, a, v.shape[-1], kernel)
    last = c[:, :, None]
    dt = torch.zeros_like(t0) if ds is None else join(ds, dz)

    # Causal queries read the state before the first token, the others the final one.
    t, shift = (t0, shift0) if causal else (join(s, z), last)
    fq, sq = query_features(b, shift, lse, kernel)
    db, read = (g1 @ t.mT) * sq, token_sum(fq, g1)
    if not causal:
        dt = dt + read
    fk, sk = key_features(a, last, kernel)
    da, dv1 = (v1 @ dt.mT) * sk, fk @ dt
    dt0 = rescale(shift0, last, kernel) * dt
    if causal:
        dt0 = dt0 + read
        more = _causal_gradients(b, a, v1, g1, lse, kernel)
        db, da, dv1 = db + more[0], da + more[1], dv1 + more[2]

    dq, dk = db @ projection, da @ projection
    if kernel == 0:
        dk = dk - da.sum(-1, keepdim=True) * (k.to(acc) * scale)
    grads = (
        token_major(x.to(like.dtype))
        for x, like in ((dq * scale, q), (dk * scale, k), (dv1[..., :-1], v))
    )
    if s0 is None:
        return *grads, t0.new_empty(0), t0.new_empty(0)
    return *grads, dt0[..., :-1].contiguous(), dt0[..., -1].contiguous()


# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, projection, *_, **__) -> int:
    """W q and W k, then linear attention on M features: 4·M·(D + Dv) a token and head."""
    b, h, n, d = q
    return 4 * b * h * n * projection[0] * (d + v[-1])


def _backward_flops(do, ds, dz, q, k, v, projection, *_, **__) -> int:
    """W q and W k again, Wᵀ twice, and linear attention's: 8·M·(D + Dv) a token and head."""
    b, h, n, d = q
    return 8 * b * h * n * projection[0] * (d + v[-1])


performer_fwd = Op(
    "performer_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? key_mask, Tensor? s0, Tensor? z0, "
    "Tensor? c0, int kernel, bool causal, float eps) "
    "-> (Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse)",
    forward_reference,
    flops=_flops,
)
performer_bwd = Op(
    "performer_bwd",
    "(Tensor do, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor projection, "
    "Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse, Tensor? key_mask, "
    "Tensor? s0, Tensor? z0, Tensor? c0, int kernel, bool causal) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds0, Tensor dz0)",
    backward_reference,
    flops=_backward_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, projection, key_mask, s0, z0, c0, *saved):
    *outs, kernel, causal, _ = saved
    o, s, z = outs[:3]
    do, ds, dz = grads
    do = torch.zeros_like(o) if do is None else do
    if (ds is None) != (dz is None):  # the ops take both or none
        ds = torch.zeros_like(s) if ds is None else ds
        dz = torch.zeros_like(z) if dz is None else dz
    dq, dk, dv, ds0, dz0 = performer_bwd.below(
        backend, do, ds, dz, q, k, v, projection, *outs, key_mask, s0, z0, c0, kernel, causal
    )
    return (dq, dk, dv) if s0 is None else (dq, dk, dv, None, None, ds0, dz0)


performer_fwd.differentiable(_gradients, by=performer_bwd, constant=2)  # c and lse

# --- public ---------------------------------------------------------------------------------------


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: str = "softmax",
    causal: bool = False,
    key_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Softmax attention, scale D^(-1/2), estimated in M random features (Choromanski 2021, eq. 7).

    Args:
        q, k: (B, H, N, D); v: (B, H, N, Dv). One of float16, bfloat16, float32 and float64 (under
            autocast they are cast first; float64 stays), one device. Sums run in float32. B and N
            may be 0: outputs are empty, and the state stays the initial one.
        projection: (M, D) float32 (float64 with float64 inputs), from `orthogonal_projection`;
            a constant, it gets no gradient.
        kernel: "softmax" (positive features, e^(w·x̂ - ‖x̂‖²/2)) or "relu" (relu(w·x̂)).
        causal: token i sees tokens j ≤ i.
        key_mask: (B, N) bool, True where a token is real; the others vanish from S, z and c.
            What a masked token holds, NaN and inf included, reaches no other token; a NaN in a real
            token is seen in every output that attends to it.
        initial_state: (S (B, H, M, Dv), z (B, H, M), c (B, H, M)) float32, from earlier tokens
            under the same projection. S and z are relative to the shift c (true sum = S·e^c).
        return_state: also return the state after the last token; S and z are differentiable with
            c held constant, which is exact for whatever depends on S·e^c and z·e^c alone.
        eps: added to the shifted denominator (≥ 1 for "softmax"), the shift held constant in the
            gradient. A row whose denominator is 0 (nothing to see, or "relu" features that do not
            meet) gives 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, (S, z, c)).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: eps is a tensor, whose gradient would be lost.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    q, k, v = check_qkv("performer_attention", q, k, v)
    check_key_mask("performer_attention", key_mask, k)
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
    eps = number("performer_attention", "eps", eps)
    if eps < 0:
        raise ValueError(f"performer_attention wants eps ≥ 0, got {eps}")
    _check_projection(q, projection)
    state = _check_state(q, v, projection, initial_state)
    # Causal and with states, CUDA C++ has another kernel (csrc/cuda/performer/), which runs where
    # it is asked for.
    simple = not causal and initial_state is None and not return_state
    backend = choose(backend, performer_fwd, q, k, v, projection, cuda=simple)
    options = KERNELS[kernel], bool(causal), eps
    o, *state, _ = performer_fwd.apply(backend, q, k, v, projection, key_mask, *state, *options)
    return (o, tuple(state)) if return_state else o


def _check_projection(q: Tensor, w: Tensor) -> None:
    acc = accumulate(q)
    if w.dim() != 2 or w.shape[1] != q.shape[-1] or w.shape[0] < 1:
        raise ValueError(
            f"performer_attention wants projection (M, D) with D = {q.shape[-1]}, got "
            + shapes(q=q, projection=w)
        )
    if w.dtype != acc or w.device != q.device:
        raise ValueError(
            f"performer_attention wants projection in {str(acc).removeprefix('torch.')} on "
            f"{q.device}, got {shapes(q=q, projection=w)}"
        )
    if w.requires_grad:
        raise ValueError("projection is a constant and gets no gradient; pass projection.detach()")


def _check_state(q, v, projection, state) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if state is None:
        return None, None, None
    s, z, c = state
    rows = (*q.shape[:2], projection.shape[0])
    want, acc = (*rows, v.shape[-1]), accumulate(q)
    if s.shape != want or z.shape != rows or c.shape != rows or {*_dtypes(s, z, c)} != {acc}:
        raise ValueError(
            f"performer_attention wants initial_state (S {want}, z {rows}, c {rows}) in "
            f"{str(acc).removeprefix('torch.')}, got {shapes(S=s, z=z, c=c)}"
        )
    same("performer_attention", S=s, z=z, c=c, projection=projection)
    return s.contiguous(), z.contiguous(), c.detach().contiguous()


def _dtypes(*tensors: Tensor) -> tuple[torch.dtype, ...]:
    return tuple(x.dtype for x in tensors)
