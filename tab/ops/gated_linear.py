"""Gated linear attention: the causal state of linear attention, which decays as time goes on.

    S_t = Diag(e^(g_t)) S_{t-1} + k_t v_tᵀ,  o_t = scale · S_tᵀ q_t

The log decay g_t is one number a head (retention: Sun et al. 2023, "Retentive Network", eq. 5), one
a head and token (the SSD form of Mamba-2: Dao and Gu 2024, eq. 6), or one a channel of the key too
(GLA: Yang et al. 2024, "Gated Linear Attention Transformers", eq. 3). Read top to bottom: ops →
autograd → public function. The reference is in gated_linear_reference.py; the kernels beside it
(csrc/cpu/gated_linear, kernels/gated_linear*.py) are for decays of heads and tokens.

A function of its own beside `linear_attention`, whose denominator and feature map belong together:
what is used with a decay has neither, but a scale, and is causal by nature.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from ._check import (
    Layout,
    accumulate,
    check_key_mask,
    check_qkv,
    check_state,
    check_tensors,
    shapes,
)
from ._heads import by_group, groups_backward, groups_forward
from ._op import Backend, Op, choose
from ._options import boolean
from ._packed import pack, sequences, unpack
from ._packed_op import packed
from ._softmax import score_scale
from ._stateless_op import stateless
from .gated_linear_normalized import forward as by_formula
from .gated_linear_normalized import normalized
from .gated_linear_reference import backward_reference, forward_reference

State = Tensor | tuple[Tensor, Tensor]

# --- ops ------------------------------------------------------------------------------------------


def _flops(q, k, v, *_, **__) -> int:
    """k vᵀ and Sᵀq: 2·D·Dv a token and head of k, and as much a token and head of q."""
    b, h, n, d = q
    return 2 * b * (h + k[1]) * n * d * v[-1]


def _backward_flops(do, ds, q, k, v, *_, **__) -> int:
    """dS = q doᵀ, and do, v and k by S or dS: 4·D·Dv a token and head of either."""
    return 2 * _flops(q, k, v)


# log_decay is (B, H, N, 1), or of the channel ops (B, H, N, D), in the accumulation type. These are
# ops of their own since kernels are registered for ops, and those of one form know not the other.
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? key_mask, Tensor? s0, float scale"

SHAPES = """
    q: B H N D
    k: B K N D
    v: B K N E
    o do: B H N E
    key_mask: B N bool
    s s0 ds: B K D E
    where: K and H % K == 0
"""
DECAYS = {"gated": "log_decay: B K N 1", "channel": "log_decay: B K N D"}


def _forward(name: str) -> Op:
    schema = f"({INPUTS}) -> (Tensor o, Tensor s)"
    shapes = SHAPES + DECAYS[name.partition("_")[0]]
    return Op(name, schema, groups_forward(forward_reference), flops=_flops, shapes=shapes)


def _backward(name: str) -> Op:
    gradients = "Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor ds0"
    schema = f"(Tensor do, Tensor? ds, {INPUTS}) -> ({gradients})"
    reference = groups_backward(backward_reference, 1)
    shapes = SHAPES + DECAYS[name.partition("_")[0]]
    return Op(name, schema, reference, flops=_backward_flops, shapes=shapes)


gated_linear_fwd, gated_linear_bwd = _forward("gated_linear_fwd"), _backward("gated_linear_bwd")
channel_gated_linear_fwd = _forward("channel_gated_linear_fwd")
channel_gated_linear_bwd = _backward("channel_gated_linear_bwd")

# --- autograd -------------------------------------------------------------------------------------


def _gradients(bwd, backend, grads, q, k, v, log_decay, key_mask, s0, o, s, scale):
    do, ds = grads
    do = torch.zeros_like(o) if do is None else do
    given = backend, do, ds, q, k, v, log_decay, key_mask, s0, scale
    if s0 is None and bwd is gated_linear_bwd:
        return gated_linear_stateless_bwd.below(*given)
    *others, ds0 = bwd.below(*given)
    return others if s0 is None else (*others, None, ds0)


def _stateless_gradients(backend, grads, *saved):
    *given, o, scale = saved
    return _gradients(gated_linear_bwd, backend, (*grads, None), *given, o, None, scale)


for fwd, bwd in (
    (gated_linear_fwd, gated_linear_bwd),
    (channel_gated_linear_fwd, channel_gated_linear_bwd),
):
    fwd.differentiable(partial(_gradients, bwd), by=bwd)
gated_linear_stateless_fwd, gated_linear_stateless_bwd = stateless(
    gated_linear_fwd, gated_linear_bwd, kept=4, gradients=_stateless_gradients
)
gated_linear_packed = packed(
    "gated_linear_attention",
    gated_linear_fwd,
    gated_linear_bwd,
    partial(_gradients, gated_linear_bwd),
)
channel_gated_linear_packed = packed(
    "gated_linear_attention",
    channel_gated_linear_fwd,
    channel_gated_linear_bwd,
    partial(_gradients, channel_gated_linear_bwd),
)

(
    gated_linear_normalized_fwd,
    gated_linear_normalized_stateless_fwd,
    gated_linear_normalized_packed,
) = normalized(gated_linear_fwd, gated_linear_bwd)

# --- public ---------------------------------------------------------------------------------------


@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = ...,
    normalize: bool = ...,
    key_mask: Tensor | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = ...,
    normalize: bool = ...,
    key_mask: Tensor | None = ...,
    initial_state: State | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    backend: Backend = ...,
) -> tuple[Tensor, State]: ...


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = False,
    key_mask: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Causal linear attention with a decaying state, `S_t = Diag(e^(g_t)) S_{t-1} + k_t v_tᵀ`,
    `o_t = scale · S_tᵀ q_t` (Sun et al. 2023, eq. 5; Dao and Gu 2024, eq. 6; Yang et al. 2024,
    eq. 3).

    Args:
        q: (B, H, N, D); k: (B, H_kv, N, D); v: (B, H_kv, N, Dv). One of float16, bfloat16, float32
            and float64 (under autocast they are cast first; float64 stays), one device; a feature
            map, if any, is applied before. Sums run in float32. B and N may be 0: outputs are
            empty, and the state stays the initial one. H_kv divides H: head h of q attends with
            head ⌊h·H_kv/H⌋ of k and v.
        log_decay: g, floating, of any precision: (H_kv,) for each head (retention, log γ_h),
            (B, H_kv, N) for each token too (Mamba-2, Δ·A), or (B, H_kv, N, D) for each channel of
            the key (GLA). It acts before the token's own key is added. 0 keeps the state, −inf
            forgets it. Differentiable.
        scale: of the output, D^(-1/2) by default; it cancels where `normalize` is True.
        normalize: divide by the denominator q_tᵀz_t, z_t = Diag(e^(g_t)) z_{t-1} + k_t, so that the
            weights of a query add up to 1, as in `linear_attention`. Not the default, as neither
            retention nor GLA nor Mamba-2 does. It wants positive features; z and the denominator
            are float32. A row whose denominator is 0 gives 0.
        key_mask: (B, N) bool, True where a token is real; the others add nothing to the state, and
            nothing decays with them: it is as though they were not there. What a masked token
            holds, NaN and inf included, reaches no other token; a NaN in a real token is seen in
            every later output.
        initial_state: from earlier tokens, in float32: S (B, H_kv, D, Dv), or, where `normalize`
            is True, (S, z (B, H_kv, D)).
        return_state: also return the state after the last token.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            Each has a state, (S, …) in all, and may be empty. On a GPU reading the ends waits.
            Or give q, k and v as jagged nested tensors (S, H, N_s, D); o is one, too, and
            log_decay still (H_kv,) or dense, (1, H_kv, T) or (1, H_kv, T, D).
        layout: "bhnd", or "bnhd" where q, k, v and o are (B, N, H, ·), and log_decay (B, N, H) or
            (B, N, H, D): views, nothing is copied.
        backend: "auto", "reference" or, for decays of heads and tokens, "cpp" or "triton"; see
            `tab.use_backend`.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or (o, state).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: scale is a tensor, whose gradient would be lost.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: retention, its heads forgetting at rates of their own.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> decay = torch.log(1 - 2.0 ** (-5 - torch.arange(4)))
        >>> o, state = tab.gated_linear_attention(q, k, v, decay, return_state=True)
        >>> o.shape, state.shape
        (torch.Size([2, 4, 64, 32]), torch.Size([2, 4, 32, 32]))
    """
    name = "gated_linear_attention"
    (q, k, v), packing = unpack(name, layout, cu_seqlens, q=q, k=k, v=v)
    q, k, v = check_qkv(name, q, k, v, grouped=True, layout=layout)
    boolean(name, "normalize", normalize)
    boolean(name, "return_state", return_state)
    g = _check_decay(k, log_decay, layout)
    check_key_mask(name, key_mask, k)
    scale = score_scale(name, scale, q.shape[-1])
    s0, z0 = _check_state(sequences(k, packing), k, v, initial_state, normalize)
    state: State
    if normalize:
        o, state = _normalized(packing, return_state, backend, q, k, v, g, key_mask, s0, z0)
    else:
        o, state = _attend(packing, return_state, backend, q, k, v, g, key_mask, s0, scale)
    o = pack(layout, o, packing)
    return (o, state) if return_state else o


def _attend(packing, return_state, backend, q, k, v, g, key_mask, s0, scale):
    """-> o and S"""
    one, cuts = g.shape[-1] == 1, () if packing is None else packing[:1]
    if packing is None:
        op = gated_linear_fwd if one else channel_gated_linear_fwd
    else:
        op = gated_linear_packed if one else channel_gated_linear_packed
    given = choose(backend, op, q, k, v, g), q, k, v, g, key_mask, s0, *cuts, scale
    if one and not (return_state or cuts):
        return gated_linear_stateless_fwd.apply(*given), g  # no state
    return by_group(op, *given)


def _on_a_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _in_kernels(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels take z beside S, and v as it is."""
    takes = gated_linear_normalized_fwd.takes.get("triton")
    return _on_a_gpu(q) and takes is not None and takes(q, k, v) is None


def _normalized(packing, return_state, backend, q, k, v, g, key_mask, s0, z0):
    """-> o, and S and z"""
    if g.shape[-1] != 1 or not _in_kernels(q, k, v):
        run = partial(_attend, packing, return_state, backend)
        o, *state, _ = by_formula(run, q, k, v, g, key_mask, s0, z0)
        return o, tuple(state)
    cuts = () if packing is None else packing[:1]
    op = gated_linear_normalized_packed if cuts else gated_linear_normalized_fwd
    given = choose(backend, op, q, k, v, g), q, k, v, g, key_mask, s0, z0, *cuts
    if not (return_state or cuts):
        return gated_linear_normalized_stateless_fwd.apply(*given)[0], g  # no state
    o, *state, _ = op.apply(*given)
    return o, tuple(state)


def _check_decay(k: Tensor, log_decay: Tensor, layout: Layout) -> Tensor:
    """(B, H_kv, N, 1 or D) in the accumulation type, with a view's strides."""
    check_tensors("gated_linear_attention", log_decay=log_decay)
    (b, h, n, d), g = k.shape, log_decay
    rows = (b, h, n) if layout == "bhnd" else (b, n, h)
    if tuple(g.shape) not in ((h,), rows, (*rows, d)) or not g.is_floating_point():
        raise ValueError(
            f"gated_linear_attention wants log_decay {(h,)}, {rows} or {(*rows, d)} as k "
            f"{(*rows, d)}, floating; got {shapes(log_decay=g)}"
        )
    if g.device != k.device:
        raise ValueError(
            f"gated_linear_attention wants one device, got {shapes(k=k)}, {shapes(log_decay=g)}"
        )
    if layout == "bnhd" and g.dim() > 1:
        g = g.transpose(1, 2)
    g = g.to(accumulate(k))
    if g.dim() == 1:
        return g[:, None, None].expand(b, h, n, 1)
    return g if g.dim() == 4 else g[..., None]


def _check_state(b, k, v, state, normalize) -> tuple[Tensor | None, Tensor | None]:
    if state is None:
        return None, None
    rows = b, k.shape[1], k.shape[3]
    want = {"S": (*rows, v.shape[3]), **({"z": rows} if normalize else {})}
    given = check_state("gated_linear_attention", state, k, **want)
    return given[0].contiguous(), given[1].contiguous() if normalize else None
