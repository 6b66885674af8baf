"""Multi-head latent attention: all heads read keys and values out of one small latent per token.

    k_n,h = W_uk,h c,  v_h = W_uv,h c
    S_h = (q_n,h·k_n,h + q_r,h·k_r)·scale,  o_h = softmax(S_h) v_h

DeepSeek-V2 2024, eq. 9-19, and appendix C for the absorbed form: W_uk joins the query
(q̃_h = W_uk,hᵀ q_n,h) and W_uv the output, so that attention happens among the latents themselves.
c (B, N, R) is the latent, k_r (B, N, Dr) the one rotary key that all heads share.

Three forms of one function: "expand" writes K_h and V_h for every head, "absorb" writes q̃ and z of
width R, "fused" (the ops mla_fwd and mla_bwd) holds one head's keys and values at a time.
Read top to bottom: ops → autograd → public function. The fused reference is in mla_reference.py,
the other two forms in mla_forms.py, decoding in mla_decode.py. Beside the references: csrc/cpu/mla.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from ._check import Layout, check_key_mask, operands
from ._op import Backend, Op, choose
from ._options import boolean, check_causal
from ._packed import pack, pack_rows, refuse_packed, unpack
from ._packed_op import packed
from ._scores import check_scores
from ._sinks_op import attend, with_sinks
from ._softmax import score_scale
from .merge import merge_sinks
from .mla_forms import check_latents, compose
from .mla_reference import (
    backward_reference,
    bent_backward_reference,
    bent_forward_reference,
    forward_reference,
)

Form = Literal["auto", "fused", "expand", "absorb"]
FORMS: tuple[str, ...] = get_args(Form)
# "auto" takes a compiled fused kernel up to this N, else expand and SDPA. CPU, float32, one AVX-512
# thread, forward and backward, against expand: 3.7 times at N 64 (Dn 32, R 64), 3.9 at N 4096;
# 1.6 at N 8192 and 0.8 at N 16384 where Dn + Dr = Dv (64); 1.3 to 2.3 with R 512 and Dn 128 at
# N 64 to 2048. Where Dn + Dr is not Dv, SDPA on a CPU has no flash kernel and writes N×N scores:
# fused is 3.5 times as fast at N 8192, and taken at every N. On a GPU no bound is measured yet.
FUSED_TOKENS = {"cpu": 8192, "cuda": 256}

# --- ops ------------------------------------------------------------------------------------------


def _flops(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *_, **__) -> int:
    """K and V from the latent, then scores over Dn + Dr and sums over Dv."""
    b, h, n, dn = q_nope
    r, dv = c_kv[-1], w_uv[1]
    return 2 * b * h * n * (r * (dn + dv) + n * (dn + q_rope[-1] + dv))


def _backward_flops(do, dlse, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *_, **__) -> int:
    """K and V again, each with two gradients; scores, do·v, dq, dk and dv."""
    b, h, n, dn = q_nope
    r, dv = c_kv[-1], w_uv[1]
    return 2 * b * h * n * (3 * r * (dn + dv) + n * (3 * (dn + q_rope[-1]) + 2 * dv))


SHAPES = """
    q_nope: B H N D
    q_rope: B H N P
    c_kv: B N R
    k_rope: B N P
    w_uk: H D R
    w_uv: H E R
    o do: B H N E
    lse dlse: B H N
    key_mask: B N bool
    slopes: H
"""


def _ops(name: str, forward: Callable, backward: Callable, rules: str, bends: str) -> list[Op]:
    """name_fwd and name_bwd; `rules` stand behind the tensors, `bends` behind the options."""
    x = ["q_nope", "q_rope", "c_kv", "k_rope", "w_uk", "w_uv"]
    given = ", ".join(f"Tensor {y}" for y in x)
    grads = ", ".join(f"Tensor d{y}" for y in x)
    rest = f"Tensor? key_mask{rules}, float scale, bool causal{bends}"
    return [
        Op(
            f"{name}_fwd",
            f"({given}, {rest}) -> (Tensor o, Tensor lse, Tensor max_logits)",
            forward,
            flops=_flops,
            shapes=SHAPES,
        ),
        Op(
            f"{name}_bwd",
            f"(Tensor do, Tensor? dlse, {given}, Tensor o, Tensor lse, {rest}) -> ({grads})",
            backward,
            flops=_backward_flops,
            shapes=SHAPES,
        ),
    ]


mla_fwd, mla_bwd = _ops("mla", forward_reference, backward_reference, "", "")
# With a cap or ALiBi's slopes: ops of their own, since kernels are registered for ops, and CUDA C++
# knows neither.
bent_mla_fwd, bent_mla_bwd = _ops(
    "bent_mla", bent_forward_reference, bent_backward_reference, ", Tensor? slopes",
    ", float softcap",
)  # fmt: skip

# --- autograd -------------------------------------------------------------------------------------


def _gradients(bwd, n, backend, grads, *saved):
    """n: of the tensors."""
    tensors, (o, lse, _), options = saved[:n], saved[n : n + 3], saved[n + 3 :]
    do, dlse = grads
    do = torch.zeros_like(o) if do is None else do
    return bwd.below(backend, do, dlse, *tensors[:6], o, lse, *tensors[6:], *options)


def _differentiable(fwd: Op, bwd: Op) -> Op:
    """Also packed, which is returned, and both with sinks."""
    gradients = partial(_gradients, bwd, fwd.tensors)
    fwd.differentiable(gradients, by=bwd, constant=1)
    many = packed("mla_attention", fwd, bwd, gradients, constant=1)
    with_sinks(fwd)
    with_sinks(many)
    return many


mla_packed = _differentiable(mla_fwd, mla_bwd)
bent_mla_packed = _differentiable(bent_mla_fwd, bent_mla_bwd)

# --- public ---------------------------------------------------------------------------------------


@overload
def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    form: Form = ...,
    return_lse: Literal[False] = ...,
    return_max_logits: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = ...,
    is_causal: bool | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    sinks: Tensor | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    layout: Layout = ...,
    form: Form = ...,
    return_lse: bool = ...,
    return_max_logits: bool = ...,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, ...]: ...


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = False,
    is_causal: bool | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layout: Layout = "bhnd",
    form: Form = "auto",
    return_lse: bool = False,
    return_max_logits: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Multi-head latent attention, `o_h = softmax((q_n·W_uk,h c + q_r·k_r)·scale) W_uv,h c`.

    DeepSeek-V2 2024, eq. 9-19. Positions are the caller's: q_rope and k_rope come rotated.

    Args:
        q_nope: (B, H, N, Dn); q_rope: (B, H, N, Dr), Dr ≥ 0; c_kv: (B, N, R); k_rope: (B, N, Dr);
            w_uk: (H, Dn, R); w_uv: (H, Dv, R). One floating dtype, one device. Sums in float32.
        causal: token i sees tokens j ≤ i.
        is_causal: another name of `causal`.
        key_mask: (B, N) bool, True where a token is real; what the others hold, NaN too, reaches
            no real token, forward or backward. A query that sees no key gives 0.
        scale: 1/√(Dn + Dr) when None.
        sinks: (H,), a logit for each head that joins the sum of every softmax without a value
            (`tab.merge_sinks`). Learned where it requires grad.
        softcap: c > 0 bends the scores to c·tanh(s/c) (Gemma 2 2024, sec. 2), before alibi.
        alibi: (H,), slopes m: m·|i − j| is subtracted from the scores (Press et al. 2021, "Train
            short, test long"); without gradient. Softcap and alibi are of the fused form alone.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences with a 0 before them: packed,
            they lie one behind the other, q (1, H, T, D), and no token reaches another's sequence.
            c_kv is (1, T, R), k_rope (1, T, Dr), max_logits (S, H), and the form "fused". A
            sequence may be empty. On a GPU reading the ends waits.
            Or give these four as jagged nested tensors (S, H, N_s, D); o is one, too.
        layout: "bhnd", or "bnhd" where q_nope, q_rope and o are (B, N, H, ·): views, nothing is
            copied.
        form: "fused" (K_h and V_h never written; the only form with kernels of its own), "expand"
            (K_h and V_h written, then SDPA), "absorb" (attention among the latents, by SDPA), or
            "auto": fused where a compiled kernel is there and N ≤ 8192 (on a GPU 256) or, on a CPU,
            where Dn + Dr is not Dv, or where there are sinks, or where a backend is asked for by
            name; else expand. Causal, on a GPU and compiled, SDPA lets a NaN of a later token
            through to earlier ones; fused does not.
        return_lse: also return log Σ_j exp(S_ij), sinks included, (B, H, N), float32 (float64 for
            float64 input).
        return_max_logits: also return each head's largest score, (B, H), the same dtype, without
            gradient; masked tokens do not count, neither as keys nor as queries, nor do sinks.
        backend: "auto", "reference", "cpp", "triton" or "cuda", of the fused form.

    Returns:
        o (B, H, N, Dv) in the input's dtype, or a tuple (o, lse, max_logits) of what was asked for.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; the message prints them.
        TypeError: scale or softcap is a tensor.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: H 4 heads of Dn 16 and Dr 8 out of a latent of R 32; two forms, one function.
        >>> q_nope, q_rope = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64, 8)
        >>> c_kv, k_rope = torch.randn(2, 64, 32), torch.randn(2, 64, 8)
        >>> w_uk, w_uv = torch.randn(2, 4, 16, 32) / 6
        >>> x = q_nope, q_rope, c_kv, k_rope, w_uk, w_uv
        >>> o = tab.mla_attention(*x, causal=True)
        >>> torch.allclose(o, tab.mla_attention(*x, causal=True, form="absorb"), atol=1e-4)
        True
    """
    (q_nope, q_rope, c_kv, k_rope), packing = unpack(
        "mla_attention", layout, cu_seqlens,
        q_nope=q_nope, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope,
    )  # fmt: skip
    causal = check_causal("mla_attention", causal, is_causal)
    boolean("mla_attention", "return_lse", return_lse)
    boolean("mla_attention", "return_max_logits", return_max_logits)
    x = operands(
        "mla_attention", layout,
        q_nope=q_nope, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope, w_uk=w_uk, w_uv=w_uv,
    )  # fmt: skip
    check_latents("mla_attention", *x, layout=layout)
    check_key_mask("mla_attention", key_mask, q_nope)
    cap, slopes = check_scores("mla_attention", q_nope, sinks, softcap, alibi)
    bent = slopes is not None or cap > 0
    cuts = () if packing is None else packing[:1]
    if packing is None:
        op = bent_mla_fwd if bent else mla_fwd
    else:
        op = bent_mla_packed if bent else mla_packed
        if form in ("expand", "absorb"):
            refuse_packed(
                "mla_attention", packing, f'form="{form}"', 'use "fused", or leave it out'
            )
        form = "fused" if form == "auto" else form
    # SDPA gives no lse, and on a CPU has no flash kernel for two widths.
    writes = q_nope.is_cpu and q_nope.shape[-1] + q_rope.shape[-1] != w_uv.shape[1]
    form, backend = _choose_form(form, backend, x, writes or sinks is not None, bent, op)
    scale = score_scale("mla_attention", scale, q_nope.shape[-1] + q_rope.shape[-1])
    if form == "fused":
        rules, bends = ((slopes,), (cap,)) if bent else ((), ())
        o, lse, peak = attend(
            op, backend, sinks, *x, key_mask, *rules, *cuts, scale, causal, *bends
        )
    else:
        want_lse = return_lse or sinks is not None
        o, lse, peak = compose(form, x, scale, causal, key_mask, want_lse, return_max_logits)
        if sinks is not None:
            o, lse = merge_sinks(o, lse, sinks)
    o = pack(layout, o, packing)
    extra = [pack_rows(lse, packing)] if return_lse else []
    extra += [peak] if return_max_logits else []
    return (o, *extra) if extra else o


def _compiled(device: str) -> bool:
    """Whether a kernel other than the reference serves mla_fwd on this kind of device."""
    return device in ("cpu", "cuda") and (
        mla_fwd.why_not("cpp" if device == "cpu" else "triton") is None
    )


def _choose_form(
    form: Form, backend: Backend, x: tuple[Tensor, ...], writes: bool, bent: bool = False,
    op: Op = mla_fwd,
) -> tuple[Form, Backend]:  # fmt: skip
    """writes: whether `expand` would write all scores. bent: by a softcap or alibi. op: that of the
    fused form."""
    if form not in FORMS:
        raise ValueError(f"form={form!r}: choose one of {', '.join(FORMS)}")
    if form in ("expand", "absorb"):
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"form={form!r} is a composition of PyTorch operators and takes no "
                f'backend={backend!r}; use form="fused", or leave the backend out'
            )
        if bent:
            raise ValueError(
                f"form={form!r} runs SDPA, which takes neither softcap nor alibi; "
                'use form="fused", or leave the form out'
            )
        return form, "auto"
    backend = choose(backend, op, *x)
    if form == "auto" and backend == "auto" and not bent:
        device = x[0].device.type
        better = x[0].shape[2] <= FUSED_TOKENS.get(device, 0) or writes
        form = "fused" if better and _compiled(device) else "expand"
    return ("fused" if form == "auto" else form), backend
