"""MLA as the paper has it, inputs for it, and the operator called alike."""

import torch
from proof import layout

from tab.functional import mla_attention

NAMES = "o lse dq_nope dq_rope dc_kv dk_rope dw_uk dw_uv"


def operands(size, generator, dtype=torch.float32, how="contiguous"):
    b, h, n, dn, dr, r, dv = size
    shapes = (b, h, n, dn), (b, h, n, dr), (b, n, r), (b, n, dr), (h, dn, r), (h, dv, r)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    drawn = [x / r**0.5 if i > 3 else x for i, x in enumerate(drawn)]
    drawn[:2] = [layout(x, how) for x in drawn[:2]]
    # `layout` is written for four dimensions: the others pass through with one more in front.
    drawn[2:] = [layout(x[None], how if how == "sliced" else "contiguous")[0] for x in drawn[2:]]
    return [x.to(dtype) for x in drawn] if dtype != torch.float64 else drawn


def textbook(causal=False, key_mask=None, scale=None, softcap=0.0, slopes=None):
    """DeepSeek-V2 eq. 9-19 word for word, one einsum a line, softmax of the whole score matrix,
    which may be capped (Gemma 2 2024, sec. 2) and biased (Press et al. 2021)."""

    def f(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
        n = q_nope.shape[2]
        k_nope = torch.einsum("bnr,hdr->bhnd", c_kv, w_uk)
        v = torch.einsum("bnr,hdr->bhnd", c_kv, w_uv)
        s = torch.einsum("bhid,bhjd->bhij", q_nope, k_nope)
        s = s + torch.einsum("bhid,bjd->bhij", q_rope, k_rope)
        s = s * (scale or (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5)
        if softcap:
            s = softcap * (s / softcap).tanh()
        if slopes is not None:
            i = torch.arange(n)
            s = s - (slopes[:, None, None] * (i[:, None] - i).abs()).to(s.dtype)
        if causal:
            s = s.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        if key_mask is not None:
            s = s.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        lse = s.logsumexp(-1)
        return s.softmax(-1) @ v, lse.to(torch.promote_types(lse.dtype, torch.float32))

    return f


def named(form, **options):
    """The options of mla_attention for one of FORMS."""
    backend = {"fused": "reference", "cpp": "cpp"}.get(form, "auto")
    return {"form": "fused" if form == "cpp" else form, "backend": backend, **options}


def ours(form, **options):
    options = named(form, **options)
    return lambda *x: mla_attention(*x, return_lse=True, **options)
