"""Two attentions over disjoint keys, put together: by their log-sum-exp, exactly.

    L = log(e^L₁ + e^L₂),  o = e^(L₁ − L) o₁ + e^(L₂ − L) o₂

Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", sec. 3; Dao 2023,
"FlashAttention-2", sec. 3.1. A sink is a second attention whose lse is one logit, and whose o is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import Layout, accumulate, as_given, check_tensors, heads_first, same, shapes
from ._scores import check_sinks


def merge_attention(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, *, layout: Layout = "bhnd"
) -> tuple[Tensor, Tensor]:
    """What attention to both sets of keys would have given, of the attentions to each:
    `o = e^(L₁ − L)·o₁ + e^(L₂ − L)·o₂`, `L = log(e^L₁ + e^L₂)` (Dao 2023, sec. 3.1).

    The same queries, the same scale, and no key in both sets. More parts merge one after the other,
    in any order. It is made of PyTorch's operators, which have derivatives of any order.

    Args:
        o1, o2: (B, H, N, Dv), of one dtype and device.
        lse1, lse2: (B, H, N), in the accumulation type (float32, float64 of float64), as
            `return_lse` gives them; −∞ where a query saw nothing, and then o counts for nothing.
        layout: "bhnd", or "bnhd" where o1 and o2 are (B, N, H, Dv); lse is (B, H, N) in both.

    Returns:
        o, like o1, and lse, like lse1; 0 and −∞ where a query saw nothing in either.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.

    Example: the tokens nearby, and those that a pattern adds.
        >>> q, k, v = torch.randn(3, 2, 4, 64, 32)  # each (B, H, N, D)
        >>> blocks = torch.eye(4).bool()
        >>> own, others = (tab.BlockPattern.from_blocks(x, 16, 64) for x in (blocks, ~blocks))
        >>> parts = [tab.sparse_attention(q, k, v, p, return_lse=True) for p in (own, others)]
        >>> o, lse = tab.merge_attention(*parts[0], *parts[1])
        >>> whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.allclose(o, whole, atol=1e-5)
        True
    """
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    check_tensors("merge_attention", **given)
    o1, o2 = heads_first("merge_attention", layout, o1, o2)
    acc, rows = accumulate(o1), "B, H, N" if layout == "bhnd" else "B, N, H"
    if o1.dim() != 4 or o2.shape != o1.shape or any(x.shape != o1.shape[:3] for x in (lse1, lse2)):
        raise ValueError(
            f"merge_attention wants o1, o2 ({rows}, Dv) of one shape and lse1, lse2 (B, H, N); got "
            + shapes(**given)
        )
    if not lse1.dtype == lse2.dtype == acc:
        raise ValueError(
            f"merge_attention wants lse1 and lse2 in {str(acc).removeprefix('torch.')}, as "
            f"return_lse gives them; got {shapes(**given)}"
        )
    same("merge_attention", layout, o1=o1, o2=o2)
    w1, w2, lse = shares(lse1, lse2)
    x, y = (
        o.to(acc).masked_fill((w == 0)[..., None], 0.0) * w[..., None]
        for o, w in ((o1, w1), (o2, w2))
    )
    return as_given(layout, (x + y).to(o1.dtype)), lse


def merge_sinks(
    o: Tensor, lse: Tensor, sinks: Tensor, *, layout: Layout = "bhnd"
) -> tuple[Tensor, Tensor]:
    """What attention would have given with one more key in every row, whose score is the head's own
    logit s_h and whose value is 0: `o' = e^(L − L')·o`, `L' = log(e^L + e^s_h)`.

    Attention sinks as in gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card", sec. 2.2;
    Xiao et al. 2023, "Efficient streaming language models with attention sinks", sec. 3.3): a head
    may attend to nothing. s_h = 0 is softmax with 1 in its denominator. `sinks=` of the attention
    functions does this; call it after the parts of the keys are merged. It is made of PyTorch's
    operators, which have derivatives of any order.

    Args:
        o: (B, H, N, Dv); lse: (B, H, N) in the accumulation type (float32, float64 of float64), as
            `return_lse` gives it; −∞ where a query saw nothing.
        sinks: (H,), of a floating dtype; −∞ for a head without one.
        layout: "bhnd", or "bnhd" where o is (B, N, H, Dv); lse is (B, H, N) in both.

    Returns:
        o, like o, and lse, like lse; where a query saw nothing 0 and the sink.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.

    Example: at a logit of 0 and scores of 0, four keys share ⅘ of the weight.
        >>> q, k, v = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
        >>> o, lse = tab.local_attention(q, k, v, window=3, return_lse=True)
        >>> tab.merge_sinks(o, lse, torch.zeros(1))[0][0, 0, 0]
        tensor([0.8000, 0.8000])
    """
    given = {"o": o, "lse": lse}
    check_tensors("merge_sinks", **given, sinks=sinks)
    (o,) = heads_first("merge_sinks", layout, o)
    acc, rows = accumulate(o), "B, H, N" if layout == "bhnd" else "B, N, H"
    if o.dim() != 4 or lse.shape != o.shape[:3] or lse.dtype != acc:
        raise ValueError(
            f"merge_sinks wants o ({rows}, Dv) and lse (B, H, N) in "
            f"{str(acc).removeprefix('torch.')}, as return_lse gives it; got {shapes(**given)}"
        )
    check_sinks("merge_sinks", sinks, o)
    w, _, total = shares(lse, sinks.to(acc)[:, None])
    return as_given(layout, (o.to(acc) * w[..., None]).to(o.dtype)), total


def shares(lse1: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> e^(L₁ − L), e^(L₂ − L) and L. Where L is NaN, since a query or a key that it sees is, the
    shares are 1: what is NaN already stays so, and no gradient of 0 becomes NaN, which a masked
    token would pass on."""
    odd = ~((lse1 < torch.inf) & (lse2 < torch.inf))
    lse1, lse2 = torch.where(odd, 0.0, lse1), torch.where(odd, 0.0, lse2)
    top = torch.maximum(lse1, lse2).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    w1, w2 = (lse1 - top).exp(), (lse2 - top).exp()  # ≤ 1
    total = w1 + w2
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (top + total.log()).masked_fill(nothing, -torch.inf).masked_fill(odd, torch.nan)
    return (w1 / total).masked_fill(odd, 1.0), (w2 / total).masked_fill(odd, 1.0), lse
