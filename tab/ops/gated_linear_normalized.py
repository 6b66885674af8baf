"""Gated linear attention that is divided by its denominator, as ops of their own: `normalize` of
`gated_linear_attention` on a GPU.

    o_t = S_tᵀq_t / (q_tᵀz_t),  z_t = e^(g_t) z_{t-1} + k_t

z is S of a v that is 1: one column more, of which o's is the denominator. So the reference and C++
are those of gated linear attention on (v, 1), in float32. With r = −do·o/den and do' = (do/den, r)
the gradients are those of (o, den) there. The kernels in Triton, kernels/gated_linear*.py, hold z
beside S, and read v as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._check import accumulate, answered, token_major
from ._heads import groups_backward, groups_forward
from ._op import Op
from ._packed_op import packed
from ._stateless_op import stateless
from .gated_linear_reference import backward_reference, forward_reference
from .linear_reference import inverse, with_ones

SHAPES = """
    z z0 dz: B K D
    den: B H N
"""

# --- by formula -----------------------------------------------------------------------------------


def widened(q, k, v, s0, z0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, (v, 1) and the state (S, z), in the accumulation type."""
    acc = accumulate(q)
    state = None if s0 is None or z0 is None else torch.cat([s0, z0[..., None]], -1)
    return q.to(acc), k.to(acc), with_ones(v.to(acc)), state


def forward(run: Callable, q, k, v, log_decay, key_mask, s0, z0):
    """-> o, S, z and the denominators (B, H, N), which carry no gradient. run: gated linear
    attention by whatever backend. A query that is hidden and not finite is taken out before and its
    NaN put in behind: in the gradient of the division 0 · NaN would be NaN, and go on to all."""
    odd = None
    if key_mask is not None:
        odd = ~(key_mask[:, None, :, None] | q.isfinite().all(-1, keepdim=True))
        q = q.masked_fill(odd, 0.0)
    *x, state = widened(q, k, v, s0, z0)
    o, s = run(*x, log_decay, key_mask, state, 1.0)
    den = o[..., -1]
    divided = o[..., :-1] * inverse(den[..., None])
    if odd is not None:
        divided = divided.masked_fill(odd, torch.nan)
    return (
        token_major(divided.to(v.dtype)),
        s[..., :-1].contiguous(),
        s[..., -1].contiguous(),
        den.detach().contiguous(),
    )


def backward(run: Callable, do, ds, dz, q, k, v, log_decay, o, den, key_mask, s0, z0):
    """-> dq, dk, dv, dlog_decay, dS₀, dz₀. run: the backward pass of gated linear attention."""
    q, o, den = answered(key_mask, do, q, o, den[..., None])
    *x, state = widened(q, k, v, s0, z0)
    acc, last = accumulate(q), None
    if ds is not None or dz is not None:
        size = *k.shape[:2], k.shape[3], v.shape[3] + 1
        last = torch.zeros(size, dtype=acc, device=k.device)
        for part, given in ((last[..., :-1], ds), (last[..., -1], dz)):
            if given is not None:
                part.copy_(given)
    low = -(do.to(acc) * o.to(acc)).sum(-1, keepdim=True)
    do = token_major(torch.cat([do.to(acc), low], -1) * inverse(den))
    *grads, first = run(do, last, *x, log_decay, key_mask, state, 1.0)
    dq, dk, dv, dg = (
        token_major(x.to(like.dtype)) for x, like in zip(grads, (q, k, v, log_decay), strict=True)
    )
    dv = token_major(dv[..., :-1].contiguous())
    return dq, dk, dv, dg, first[..., :-1].contiguous(), first[..., -1].contiguous()


# --- ops ------------------------------------------------------------------------------------------


def normalized(fwd: Op, bwd: Op) -> tuple[Op, Op, Op]:
    """gated_linear_normalized_fwd beside gated_linear_fwd, the same without the state, and of a
    packed batch; with their gradients."""
    name, inputs = "gated_linear_normalized", "Tensor q, Tensor k, Tensor v, Tensor log_decay"
    state, shapes = "Tensor? key_mask, Tensor? s0, Tensor? z0", f"{fwd.shapes}{SHAPES}"
    forwards = Op(
        f"{name}_fwd", f"({inputs}, {state}) -> (Tensor o, Tensor s, Tensor z, Tensor den)",
        groups_forward(partial(forward, forward_reference), lse=True),
        flops=lambda q, k, v, *_, **__: fwd.flops(q, k, (*v[:-1], v[-1] + 1)), shapes=shapes,
    )  # fmt: skip
    backwards = Op(
        f"{name}_bwd",
        f"(Tensor do, Tensor? ds, Tensor? dz, {inputs}, Tensor o, Tensor den, {state}) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor ds0, Tensor dz0)",
        groups_backward(partial(backward, backward_reference), 2),
        flops=lambda do, ds, dz, *x, **__: 2 * forwards.flops(*x), shapes=shapes,
    )  # fmt: skip
    for op, run, base in ((forwards, forward, fwd), (backwards, backward, bwd)):
        op.own = False
        op.implement("cpp", partial(run, partial(base.below, "auto")))

    def gradients(backend, grads, q, k, v, log_decay, key_mask, s0, z0, o, s, z, den):
        do, ds, dz = grads
        do = torch.zeros_like(o) if do is None else do
        given = backend, do, ds, dz, q, k, v, log_decay, o, den, key_mask, s0, z0
        if s0 is None:
            return backwards_stateless.below(*given)
        *others, ds0, dz0 = backwards.below(*given)
        return *others, None, ds0, dz0

    def of_stateless(backend, grads, *saved):
        *given, o, den = saved
        return gradients(backend, (*grads, None, None), *given, o, None, None, den)

    forwards.differentiable(gradients, by=backwards, constant=1)
    forwards_stateless, backwards_stateless = stateless(
        forwards, backwards, kept=4, outputs=(0, 3), gradients=of_stateless, constant=1
    )
    many = packed("gated_linear_attention", forwards, backwards, gradients, constant=1)
    return forwards, forwards_stateless, many
