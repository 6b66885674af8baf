"""Linear attention: the softmax kernel replaced by a feature map, so that the keys sum up once.

    o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + ε),  S = Σ_j φ(k_j) v_jᵀ,  z = Σ_j φ(k_j);  causal: over j ≤ i

Katharopoulos et al. 2020, "Transformers are RNNs", eq. 4-5 (bidirectional) and 9-12 (causal).
Read top to bottom: ops → autograd → public function. The reference is in linear_reference.py; the
kernels beside it: csrc/cpu/linear, kernels/linear.py and csrc/cuda/linear.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._check import Layout, check_key_mask, check_lengths, check_qkv, check_state, one_length
from ._heads import by_group, groups_backward, groups_forward
from ._op import Backend, Op, choose
from ._options import boolean, check_causal, check_eps
from ._packed import pack, sequences, softmax_tokens, unpack
from ._packed_op import packed
from ._stateless_op import stateless
from .linear_reference import backward_reference, forward_reference

FeatureMap = Literal["elu1", "relu", "identity", "softmax"]
FEATURE_MAPS = {"elu1": 0, "relu": 1, "identity": 2}  # code passed to the kernels

# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, *_, **__) -> int:
    """S = φ(k)ᵀv and φ(q)ᵀS: 2·D·Dv a key and head of k, and as much a query and head of q."""
    b, h, n, d = q
    return 2 * b * (h * n + k[1] * k[2]) * d * v[-1]


def _backward_flops(do, ds, dz, q, k, v, *_, **__) -> int:
    """dS = φ(q)ᵀdo, and do, v and φ(k) by S or dS: 4·D·Dv a key and head, and as much a query."""
    return 2 * _flops(q, k, v)


SHAPES = """
    q: B H N D
    k: B K M D
    v: B K M E
    o do: B H N E
    key_mask: B M bool
    s s0 ds: B K D E
    z z0 dz: B K D
    where: K and H % K == 0
    where: not causal or N == M
"""
linear_fwd = Op(
    "linear_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? s0, Tensor? z0, "
    "int feature_map, bool causal, float eps) -> (Tensor o, Tensor s, Tensor z)",
    groups_forward(forward_reference),
    flops=_flops,
    shapes=SHAPES,
)
linear_bwd = Op(
    "linear_bwd",
    "(Tensor do, Tensor? ds, Tensor? dz, Tensor q, Tensor k, Tensor v, Tensor o, Tensor s, "
    "Tensor z, Tensor? key_mask, Tensor? s0, Tensor? z0, int feature_map, bool causal, float eps) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds0, Tensor dz0)",
    groups_backward(backward_reference),
    flops=_backward_flops,
    shapes=SHAPES,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, q, k, v, key_mask, s0, z0, o, s, z, *options):
    do, ds, dz = grads
    do = torch.zeros_like(o) if do is None else do
    if (ds is None) != (dz is None):  # the ops take both or none
        ds = torch.zeros_like(s) if ds is None else ds
        dz = torch.zeros_like(z) if dz is None else dz
    given = backend, do, ds, dz, q, k, v, o, s, z, key_mask, s0, z0, *options
    if s0 is None:
        return linear_stateless_bwd.below(*given)
    dq, dk, dv, ds0, dz0 = linear_bwd.below(*given)
    return dq, dk, dv, None, ds0, dz0


linear_fwd.takes["cuda"] = one_length
linear_fwd.differentiable(_gradients, by=linear_bwd)
linear_stateless_fwd, linear_stateless_bwd = stateless(linear_fwd, linear_bwd, kept=3)
linear_packed = packed("linear_attention", linear_fwd, linear_bwd, _gradients)

# --- public ---------------------------------------------------------------------------------------


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = ...,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor] | None = ...,
    return_state: Literal[False] = ...,
    eps: float = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = ...,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor] | None = ...,
    return_state: Literal[True],
    eps: float = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu1",
    causal: bool = False,
    is_causal: bool | None = None,
    key_mask: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Linear attention, `o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + eps)` (Katharopoulos 2020, eq. 5, 9).

    Args:
        q: (B, H, N, D); k: (B, H_kv, N_k, D); v: (B, H_kv, N_k, Dv). One of float16, bfloat16,
            float32 and float64 (under autocast they are cast first; float64 stays), one device.
            Sums run in float32. N_k may be another than N (cross-attention), unless causal. B, N
            and N_k may be 0: the state of no keys is the initial one, and o is 0 without one.
            H_kv divides H: head h of q attends with head ⌊h·H_kv/H⌋ of k and v (grouped-query
            attention, Ainslie et al. 2023), which every kernel reads in place.
        feature_map: "elu1" (elu + 1), "relu", "identity" (q and k are features already) or
            "softmax" (of each q over D, of k over the tokens; Shen et al. 2021; not causal).
        causal: token i sees tokens j ≤ i.
        is_causal: another name of `causal`.
        key_mask: (B, N_k) bool, True where a token is real; the others vanish from S and from z.
            What a masked token holds, NaN and inf included, reaches no other token; a NaN in a real
            token is seen in every output that attends to it.
        initial_state: (S (B, H_kv, D, Dv), z (B, H_kv, D)) float32, from earlier tokens.
        return_state: also return the state after the last token.
        eps: added to the denominator. A row whose denominator is 0 gives 0.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            Each has a state, (S, …) in all, and may be empty. On a GPU reading the ends waits.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·): views, nothing is copied.
        backend: "auto", "reference", "cpp", "triton" or "cuda"; see `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, (S, z)).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: eps is a tensor, whose gradient would be lost.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: the tokens in two parts, the second from the state that the first left.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> whole = tab.linear_attention(q, k, v, causal=True)
        >>> first, later = (slice(0, 40), slice(40, 64))
        >>> x = [t[:, :, first] for t in (q, k, v)]
        >>> _, state = tab.linear_attention(*x, causal=True, return_state=True)
        >>> x = [t[:, :, later] for t in (q, k, v)]
        >>> o = tab.linear_attention(*x, causal=True, initial_state=state)
        >>> torch.allclose(o, whole[:, :, later], atol=1e-5)
        True

    Packed, 40 tokens and 24 tokens are two sequences.
        >>> ends = torch.tensor([0, 40, 64], dtype=torch.int32)
        >>> o = tab.linear_attention(*(t[:1] for t in (q, k, v)), cu_seqlens=ends)
        >>> torch.allclose(o[:, :, later], tab.linear_attention(*(t[:1] for t in x)), atol=1e-5)
        True
    """
    (q, k, v), packing = unpack("linear_attention", layout, cu_seqlens, q=q, k=k, v=v)
    q, k, v = check_qkv("linear_attention", q, k, v, grouped=True, cross=True, layout=layout)
    causal = check_causal("linear_attention", causal, is_causal)
    boolean("linear_attention", "return_state", return_state)
    check_lengths("linear_attention", q, k, causal)
    check_key_mask("linear_attention", key_mask, k)
    eps = check_eps("linear_attention", eps)
    s0, z0 = _check_state(sequences(k, packing), k, v, initial_state)
    if feature_map == "softmax":
        if causal or initial_state is not None:
            raise ValueError(
                'feature_map="softmax" normalises k over all tokens: it has no causal form and '
                'takes no initial_state; use "elu1" or "relu"'
            )
        q, k = q.softmax(-1), softmax_tokens(k, key_mask, packing)
        feature_map = "identity"
    if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map={feature_map!r}: choose one of {', '.join(FEATURE_MAPS)}, softmax "
            '(a learned map is applied by the layer "linear")'
        )
    op, cuts = (linear_fwd, ()) if packing is None else (linear_packed, packing[:1])
    backend = choose(backend, op, q, k, v)
    options = FEATURE_MAPS[feature_map], causal, eps
    given = backend, q, k, v, key_mask, s0, z0, *cuts, *options
    if not (return_state or cuts or backend == "cuda"):
        return pack(layout, linear_stateless_fwd.apply(*given), packing)
    o, s, z = by_group(op, *given)
    o = pack(layout, o, packing)
    return (o, (s, z)) if return_state else o


def _check_state(b: int, k: Tensor, v: Tensor, state) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    rows = b, k.shape[1], k.shape[3]
    s, z = check_state("linear_attention", state, k, S=(*rows, v.shape[3]), z=rows)
    return s.contiguous(), z.contiguous()
