"""FAVOR+: softmax attention in M positive random features, so that the keys sum up once.

    o_i = Σ_m e^(w_m·q̂_i) S_m / Σ_m e^(w_m·q̂_i) z_m,   x̂ = x·D^(-1/4),
    S_m = Σ_j e^(a_jm) v_j,  z_m = Σ_j e^(a_jm),  a_jm = w_m·k̂_j - ‖k̂_j‖²/2;  causal: over j ≤ i

Choromanski et al. 2021, "Rethinking Attention with Performers", eq. 7 and lemma 1; the factors
M^(-1/2) and e^(-‖q̂‖²/2) cancel. Kernel "relu": relu(w_m·x̂) in place of both exponentials.

No ε: the state is held relative to a shift, c_m = max_j a_jm, so that e^(a_jm - c_m) ≤ 1 and
z_m ≥ 1, and the query's exponent is w_m·q̂ + c_m minus its maximum over m, so the denominator is
≥ 1. The shifts cancel from o: they are exact and carry no gradient. They are taken per batch entry,
head and feature, and when causal over j ≤ i only: a later key changes nothing earlier.

Read top to bottom: ops → autograd → public function. The reference is in performer_reference.py.
Symbols: spelled out, b_im = w_m·q̂_i, `v1` is [v 1], a state `t` is [S z], and
e^lse_i = e^(shift)·(denominator + ε).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._check import (
    Layout,
    accumulate,
    check_key_mask,
    check_lengths,
    check_qkv,
    check_state,
    check_tensors,
    one_length,
    shapes,
)
from ._heads import by_group, groups_backward, groups_forward
from ._op import Backend, Op, choose
from ._options import boolean, check_causal, check_eps
from ._packed import pack, sequences, unpack
from ._packed_op import packed
from ._stateless_op import stateless_forward
from .performer_reference import backward_reference, forward_reference

Kernel = Literal["softmax", "relu"]
KERNELS = {"softmax": 0, "relu": 1}  # code passed to the kernels

# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, projection, *_, **__) -> int:
    """W q and W k, then linear attention on M features: 2·M·(D + Dv) a query or key, and head."""
    b, h, n, d = q
    return 2 * b * (h * n + k[1] * k[2]) * projection[0] * (d + v[-1])


def _backward_flops(do, ds, dz, q, k, v, projection, *_, **__) -> int:
    """W q and W k again, Wᵀ twice, and linear attention's: 4·M·(D + Dv) a query or key and head."""
    return 2 * _flops(q, k, v, projection)


SHAPES = """
    q: B H N D
    k: B K M D
    v: B K M E
    projection: F D
    o do: B H N E
    lse: B H N
    key_mask: B M bool
    s s0 ds: B K F E
    z z0 dz c c0: B K F
    where: K and H % K == 0
    where: not causal or N == M
"""
performer_fwd = Op(
    "performer_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? key_mask, Tensor? s0, Tensor? z0, "
    "Tensor? c0, int kernel, bool causal, float eps) "
    "-> (Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse)",
    groups_forward(forward_reference, lse=True),
    flops=_flops,
    shapes=SHAPES,
)
performer_bwd = Op(
    "performer_bwd",
    "(Tensor do, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor projection, "
    "Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse, Tensor? key_mask, "
    "Tensor? s0, Tensor? z0, Tensor? c0, int kernel, bool causal) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds0, Tensor dz0)",
    groups_backward(backward_reference),
    flops=_backward_flops,
    shapes=SHAPES,
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


performer_fwd.takes["cuda"] = one_length
performer_fwd.differentiable(_gradients, by=performer_bwd, constant=2)  # c and lse
performer_stateless_fwd = stateless_forward(performer_fwd)
performer_packed = packed(
    "performer_attention", performer_fwd, performer_bwd, _gradients, constant=2
)

# --- public ---------------------------------------------------------------------------------------


@overload
def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: Kernel = ...,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = ...,
    return_state: Literal[False] = ...,
    eps: float = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: Kernel = ...,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = ...,
    return_state: Literal[True],
    eps: float = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]: ...


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    *,
    kernel: Kernel = "softmax",
    causal: bool = False,
    is_causal: bool | None = None,
    key_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Softmax attention, scale D^(-1/2), estimated in M random features: `o_i = φ(q_i)ᵀS /
    (φ(q_i)ᵀz + eps)`, φ(x)_m = exp(w_m·x̂ − ‖x̂‖²/2), x̂ = x·D^(-1/4) (Choromanski 2021, eq. 7).

    Args:
        q: (B, H, N, D); k: (B, H_kv, N_k, D); v: (B, H_kv, N_k, Dv). One of float16, bfloat16,
            float32 and float64 (under autocast they are cast first; float64 stays), one device.
            Sums run in float32. N_k may be another than N (cross-attention), unless causal. B, N
            and N_k may be 0: the state of no keys is the initial one, and o is 0 without one.
            H_kv divides H: head h of q attends with head ⌊h·H_kv/H⌋ of k and v (grouped-query
            attention, Ainslie et al. 2023), which every kernel reads in place.
        projection: (M, D) float32 (float64 with float64 inputs), from `orthogonal_projection`;
            a constant, it gets no gradient.
        kernel: "softmax" (positive features, e^(w·x̂ - ‖x̂‖²/2)) or "relu" (relu(w·x̂)).
        causal: token i sees tokens j ≤ i.
        is_causal: another name of `causal`.
        key_mask: (B, N_k) bool, True where a token is real; the others vanish from S, z and c.
            What a masked token holds, NaN and inf included, reaches no other token; a NaN in a real
            token is seen in every output that attends to it.
        initial_state: (S (B, H_kv, M, Dv), z (B, H_kv, M), c (B, H_kv, M)) float32, from earlier
            tokens under the same projection. S and z are relative to the shift c (the true sum is
            S·e^c).
        return_state: also return the state after the last token; S and z are differentiable with
            c held constant, which is exact for whatever depends on S·e^c and z·e^c alone.
        eps: added to the shifted denominator (≥ 1 for "softmax"), the shift held constant in the
            gradient. A row whose denominator is 0 (nothing to see, or "relu" features that do not
            meet) gives 0.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            Each has a state, (S, …) in all, and may be empty. On a GPU reading the ends waits.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, (S, z, c)).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: eps is a tensor, whose gradient would be lost.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: near softmax attention, the nearer the more features.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 16)  # each (B, H, N, D)
        >>> w = tab.orthogonal_projection(1024, 16, generator=torch.Generator().manual_seed(0))
        >>> o = tab.performer_attention(q / 2, k / 2, v, w)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q / 2, k / 2, v)
        >>> bool((o - exact).abs().mean() < 0.02)
        True
    """
    (q, k, v), packing = unpack("performer_attention", layout, cu_seqlens, q=q, k=k, v=v)
    q, k, v = check_qkv("performer_attention", q, k, v, grouped=True, cross=True, layout=layout)
    causal = check_causal("performer_attention", causal, is_causal)
    boolean("performer_attention", "return_state", return_state)
    check_lengths("performer_attention", q, k, causal)
    check_key_mask("performer_attention", key_mask, k)
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: choose one of {', '.join(KERNELS)}")
    eps = check_eps("performer_attention", eps)
    _check_projection(q, projection, layout)
    state = _check_state(sequences(k, packing), k, v, projection, initial_state)
    # Causal and with states, CUDA C++ has another kernel (csrc/cuda/performer/), which runs where
    # it is asked for.
    simple = not causal and initial_state is None and not return_state
    op, cuts = (performer_fwd, ()) if packing is None else (performer_packed, packing[:1])
    backend = choose(backend, op, q, k, v, projection, cuda=simple)
    options = KERNELS[kernel], causal, eps
    given = backend, q, k, v, projection, key_mask, *state, *cuts, *options
    if q.is_cpu and not (return_state or cuts):  # on a GPU states go through memory
        return pack(layout, performer_stateless_fwd.apply(*given), packing)
    o, s, z, c, _ = by_group(op, *given)
    o = pack(layout, o, packing)
    return (o, (s, z, c)) if return_state else o


def _check_projection(q: Tensor, w: Tensor, layout: Layout) -> None:
    check_tensors("performer_attention", projection=w)
    acc = accumulate(q)
    if w.dim() != 2 or w.shape[1] != q.shape[-1] or w.shape[0] < 1:
        raise ValueError(
            f"performer_attention wants projection (M, D) with D = {q.shape[-1]}, got "
            + shapes(layout, q=q, projection=w)
        )
    if w.dtype != acc or w.device != q.device:
        raise ValueError(
            f"performer_attention wants projection in {str(acc).removeprefix('torch.')} on "
            f"{q.device}, got {shapes(layout, q=q, projection=w)}"
        )
    if w.requires_grad:
        raise ValueError("projection is a constant and gets no gradient; pass projection.detach()")


def _check_state(b, k, v, projection, state) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if state is None:
        return None, None, None
    rows = b, k.shape[1], projection.shape[0]
    want = {"S": (*rows, v.shape[3]), "z": rows, "c": rows}
    s, z, c = check_state("performer_attention", state, k, **want)
    return s.contiguous(), z.contiguous(), c.detach().contiguous()
