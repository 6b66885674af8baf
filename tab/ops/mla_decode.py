"""Decoding with multi-head latent attention: one query per sequence against a cache of latents.

Absorbed form (DeepSeek-V2 2024, appendix C): the cache holds [c | k_r] per token and nothing per
head, and every head reads the same rows.

    q̃_h = W_uk,hᵀ q_n,h,  S_h = (q̃_h·c + q_r,h·k_r)·scale,  z_h = softmax(S_h) c,  o_h = W_uv,h z_h
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._autograd import transforming
from ._check import accumulate, check_tensors, operands, shapes
from ._op import Backend, Op, choose
from ._softmax import row_sums, score_scale, softmax_backward, softmax_forward
from .mla_forms import check_latents
from .mla_pages import check_pages, gather_pages

# --- reference ------------------------------------------------------------------------------------


def _tile(q_nope, q_rope, cache, seqlens, w_uk):
    """In the accumulation type: q = [q̃, q_r] (B, H, R+Dr), the cache with 0 in rows that are not in
    use, whatever they hold, and who sees what, (B, H, Nmax)."""
    acc = accumulate(q_nope)
    q = torch.einsum("bhd,hdr->bhr", q_nope.to(acc), w_uk.to(acc))
    seen = torch.arange(cache.shape[1], device=cache.device) < seqlens[:, None]  # (B, Nmax)
    cached = cache.to(acc).masked_fill(~seen[..., None], 0.0)
    return torch.cat([q, q_rope.to(acc)], -1), cached, seen[:, None].expand(-1, q.shape[1], -1)


def decode_reference(q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale):
    """-> o (B, H, Dv), lse (B, H). One query per sequence over its first `seqlens` cache rows."""
    q, cached, seen = _tile(q_nope, q_rope, cache, seqlens, w_uk)
    z, lse, _ = softmax_forward(q, cached, cached[..., : w_uk.shape[-1]], seen, scale)  # (B, H, R)
    o = torch.einsum("bhr,hvr->bhv", z, w_uv.to(z.dtype))
    return o.to(q_nope.dtype).contiguous(), lse  # one layout from every backend


def paged_reference(q_nope, q_rope, cache, page_table, seqlens, w_uk, w_uv, scale):
    """The same with a cache of pages (P, S, R+Dr), copied into one piece a sequence."""
    cache = gather_pages(cache, page_table, seqlens)
    return decode_reference(q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale)


def decode_backward_reference(
    do, dlse, q_nope, q_rope, cache, seqlens, w_uk, w_uv, o, lse, scale
):  # fmt: skip
    """-> dq_n, dq_r, dcache, dW_uk, dW_uv: those of `_softmax.py`, led through both matrices.

    dz_h = W_uv,hᵀ do_h,  Δ = Σ dz·z − dlse = Σ do·o − dlse
    """
    q, cached, seen = _tile(q_nope, q_rope, cache, seqlens, w_uk)
    (acc, r), dtype = (q.dtype, w_uk.shape[-1]), q_nope.dtype
    do, uk, uv = do.to(acc), w_uk.to(acc), w_uv.to(acc)
    delta = row_sums(do, o.to(acc))
    delta = delta if dlse is None else delta - dlse
    c = cached[..., :r]
    dz = torch.einsum("bhv,hvr->bhr", do, uv)
    dq, dk, dc = softmax_backward(dz, q, cached, c, lse, delta, seen, scale)
    z, _, _ = softmax_forward(q, cached, c, seen, scale)
    dcache = torch.cat([dk[..., :r] + dc, dk[..., r:]], -1)
    grads = (
        torch.einsum("bhr,hdr->bhd", dq[..., :r], uk),
        dq[..., r:].contiguous(),
        dcache,
        torch.einsum("bhd,bhr->hdr", q_nope.to(acc), dq[..., :r]),
        torch.einsum("bhv,bhr->hvr", do, z),
    )
    return tuple(x.to(dtype) for x in grads)


# --- ops ------------------------------------------------------------------------------------------


def _flops(q_nope, q_rope, cache, seqlens, w_uk, w_uv, *_, **__) -> int:
    """q̃ and o from the latent, scores over R + Dr, sums over R; each row of the cache counts."""
    (b, h, dn), (_, n, width), (_, dv, r) = q_nope, cache, w_uv
    return 2 * b * h * (r * (dn + dv) + n * (width + r))


def _paged_flops(q_nope, q_rope, cache, page_table, seqlens, w_uk, w_uv, *_, **__) -> int:
    """Each row of each page in the table counts."""
    n = page_table[1] * cache[1]
    return _flops(q_nope, q_rope, (page_table[0], n, cache[2]), seqlens, w_uk, w_uv)


def _backward_flops(do, dlse, q_nope, q_rope, cache, seqlens, w_uk, w_uv, *_, **__) -> int:
    """q̃, scores and z again; q̃ and o with two gradients each, the rows of the cache with four."""
    (b, h, dn), (_, n, width), (_, dv, r) = q_nope, cache, w_uv
    return 2 * b * h * (r * (3 * dn + 2 * dv) + 3 * n * (width + r))


SHAPES = """
    q_nope: B H D
    q_rope: B H P
    seqlens: B
    w_uk: H D R
    w_uv: H E R
    o do: B H E
    lse dlse: B H
"""
mla_decode_op = Op(
    "mla_decode",
    "(Tensor q_nope, Tensor q_rope, Tensor cache, Tensor seqlens, Tensor w_uk, Tensor w_uv, "
    "float scale) -> (Tensor o, Tensor lse)",
    decode_reference,
    flops=_flops,
    shapes=SHAPES + "cache: B N R+P",
)
# Without gradients: those are of mla_decode, over the pages in one piece.
mla_decode_paged = Op(
    "mla_decode_paged",
    "(Tensor q_nope, Tensor q_rope, Tensor cache, Tensor page_table, Tensor seqlens, Tensor w_uk, "
    "Tensor w_uv, float scale) -> (Tensor o, Tensor lse)",
    paged_reference,
    flops=_paged_flops,
    shapes=SHAPES + "cache: C N R+P\n page_table: B T",
)
mla_decode_bwd = Op(
    "mla_decode_bwd",
    "(Tensor do, Tensor? dlse, Tensor q_nope, Tensor q_rope, Tensor cache, Tensor seqlens, "
    "Tensor w_uk, Tensor w_uv, Tensor o, Tensor lse, float scale) "
    "-> (Tensor dq_nope, Tensor dq_rope, Tensor dcache, Tensor dw_uk, Tensor dw_uv)",
    decode_backward_reference,
    flops=_backward_flops,
    shapes=SHAPES + "cache: B N R+P",
)


def _gradients(backend, grads, *saved):
    *operands, o, lse, scale = saved
    do, dlse = grads
    do = torch.zeros_like(o) if do is None else do
    *first, duk, duv = mla_decode_bwd.below("auto", do, dlse, *operands, o, lse, scale)
    return *first, None, duk, duv


mla_decode_op.differentiable(_gradients, by=mla_decode_bwd)

# --- public ---------------------------------------------------------------------------------------


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    seqlens: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """One new token per sequence against its cache of latents, in the absorbed form:
    `z_h = softmax((W_uk,hᵀq_n,h·c + q_r,h·k_r)·scale) c`, `o_h = W_uv,h z_h` (DeepSeek-V2 2024,
    appendix C).

    Args:
        q_nope: (B, H, Dn); q_rope: (B, H, Dr); w_uk: (H, Dn, R); w_uv: (H, Dv, R).
        cache: (B, Nmax, R+Dr), rows [c | k_r], nothing per head; the new token's row included.
        seqlens: (B,) int32 or int64, rows of the cache in use; above Nmax it counts as Nmax.
            A sequence of length 0 gives o 0 and lse −inf.
        page_table: (B, M) int32 or int64: the cache is (P, S, R+Dr), P pages of S rows that the
            sequences share, and row j of sequence b lies in page page_table[b, ⌊j/S⌋]. Entries
            above a sequence's length count for nothing. C++ reads the pages where they lie; the
            others, and gradients, copy each sequence into one piece first.
        scale: 1/√(Dn + Dr) when None.
        backend: "auto", "reference", "cpp", "triton" or "cuda", of the forward pass: decoding is
            inference, and its gradient is PyTorch's on every backend.

    Returns:
        o (B, H, Dv) in the input's dtype and lse (B, H) in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.
        TypeError: scale is a tensor.
        RuntimeError: the backend asked for cannot run here; the message says why.

    Example: two sequences, 10 and 3 tokens long, in caches of 16 rows.
        >>> q_nope, q_rope = torch.randn(2, 4, 16), torch.randn(2, 4, 8)
        >>> cache = torch.randn(2, 16, 40)
        >>> w_uk, w_uv = torch.randn(2, 4, 16, 32)
        >>> o, lse = tab.mla_decode(q_nope, q_rope, cache, torch.tensor([10, 3]), w_uk, w_uv)
        >>> o.shape, lse.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 4]))
    """
    named = {"q_nope": q_nope, "q_rope": q_rope, "cache": cache, "w_uk": w_uk, "w_uv": w_uv}
    check_tensors("mla_decode", **named, seqlens=seqlens)
    q_nope, q_rope, cache, w_uk, w_uv = operands("mla_decode", **named)
    scale = score_scale("mla_decode", scale, q_nope.shape[-1] + q_rope.shape[-1])
    _check(q_nope, q_rope, cache, seqlens, w_uk, w_uv, page_table)
    backend = choose(backend, mla_decode_op, q_nope, q_rope)
    if page_table is not None:
        given = q_nope, q_rope, cache, page_table, seqlens, w_uk, w_uv
        if _in_place(backend, *given):
            return mla_decode_paged.apply(backend, *given, scale)
        cache = gather_pages(cache, page_table, seqlens)
    if cache.shape[1] == 0:  # no kernel meets an empty cache
        backend = "reference"
    return mla_decode_op.apply(backend, q_nope, q_rope, cache, seqlens, w_uk, w_uv, scale)


def _in_place(backend: Backend, *tensors: Tensor) -> bool:
    """Whether the C++ kernel reads the pages where they lie: it is there, and no gradient is."""
    if backend not in ("auto", "cpp") or mla_decode_paged.why_not("cpp") or transforming():
        return False
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return tensors[0].is_cpu and tensors[2].numel() > 0 and not graph


def _check(q_nope, q_rope, cache, seqlens, w_uk, w_uv, page_table) -> None:
    rule, r, dr = None, w_uk.shape[-1], q_rope.shape[-1]
    if q_nope.dim() != 3 or q_rope.dim() != 3 or cache.dim() != 3:
        rule = "q_nope (B, H, Dn), q_rope (B, H, Dr), cache (B, Nmax, R+Dr) with rows [c | k_r]"
    elif seqlens.dtype not in (torch.int32, torch.int64) or seqlens.shape != q_nope.shape[:1]:
        rule = "seqlens (B,) int32 or int64"
    elif seqlens.device != cache.device:
        rule = "one device"
    elif cache.shape[-1] != r + dr:
        rule = f"cache rows of R + Dr = {r} + {dr} numbers"
    if rule:
        tensors = {"q_nope": q_nope, "q_rope": q_rope, "cache": cache, "seqlens": seqlens}
        raise ValueError(f"mla_decode wants {rule}; got {shapes(**tensors, w_uk=w_uk, w_uv=w_uv)}")
    if page_table is not None:
        check_pages(cache, page_table, seqlens)
        cache = cache[:1].expand(len(seqlens), -1, -1)  # the rest of the check is of rows
    # The rest is as in mla_attention, with one query and Nmax keys.
    latent, rotary = cache.split([r, dr], -1)
    check_latents(
        "mla_decode",
        q_nope[:, :, None],
        q_rope[:, :, None],
        latent,
        rotary,
        w_uk,
        w_uv,
        one_query=True,
    )
