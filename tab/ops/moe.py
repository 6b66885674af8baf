"""Mixture of experts: each token through the k of E experts that a router chose (router.py).

    y = Σ_i w_i W2_e(silu(W1_e x) ∘ W3_e x),  e = index_i

DeepSeek-V3 2024, eq. 12. T tokens, E experts, k of them per token, width F. Tokens are sorted by
expert, and one grouped matrix product serves all groups (grouped.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import exporting, transforming
from ._check import accumulate, autocast, check_tensors, same, shapes
from ._op import Op, no_flops
from .grouped import moe_grouped

# --- the order of the rows ------------------------------------------------------------------------


def order_reference(index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """index (…, k), counts (E,) -> order (T·k,), the routed rows by expert, and its inverse.

    On the CPU, where it costs no wait, index and counts are checked against each other.
    """
    flat = index.flatten()
    if flat.device.type == "cpu" and not transforming():
        _check_counts(flat, counts)
    order = flat.argsort(stable=True)
    place = torch.arange(order.shape[0], device=index.device)
    return order, torch.empty_like(order).scatter(0, order, place)


def _check_counts(flat: Tensor, counts: Tensor) -> None:
    experts = counts.shape[0]
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < experts:
        raise ValueError(
            f"moe_experts: index holds {int(flat.min())} … {int(flat.max())}, but there are "
            f"{experts} experts: give 0 … {experts - 1}"
        )
    found = torch.bincount(flat, minlength=experts)
    if not torch.equal(found, counts):
        raise ValueError(
            f"moe_experts: index names the experts {found.tolist()} times, counts says "
            f"{counts.tolist()}: give both as they come from noaux_tc_gate"
        )


moe_order = Op(
    "moe_order",
    "(Tensor index, Tensor counts) -> (Tensor, Tensor)",
    order_reference,
    flops=no_flops,
)


class _Permute(torch.autograd.Function):
    """x[order]; the gradient is a gather too, by the inverse: no scatter, no atomics."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx, g):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(g, inverse, order), None, None


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """torch.func and exported graphs differentiate PyTorch's own operator."""
    if transforming() or exporting():
        return x[order]
    return _Permute.apply(x, order, inverse)


# --- public ---------------------------------------------------------------------------------------


def moe_experts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor, counts: Tensor
) -> Tensor:
    """SwiGLU experts over routed tokens, `y = Σ_i w_i W2_e(silu(W1_e x) ∘ W3_e x)`, e = index_i.

    Args:
        x: (…, C); w13: (E, 2F, C), the rows of W1 and then those of W3; w2: (E, C, F). One floating
            dtype, one device.
        weights, index: (…, k); counts: (E,), how often each expert occurs in index: as they come
            from `noaux_tc_gate`. On the CPU wrong indices and counts raise; a GPU is not asked.

    Returns:
        y (…, C) in x's dtype; differentiable in x, w13, w2 and weights.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message prints them.

    Example: 8 tokens of width C 16 through 2 of E 4 experts of width F 32.
        >>> x, w13, w2 = torch.randn(8, 16), torch.randn(4, 64, 16), torch.randn(4, 16, 32)
        >>> routed = tab.noaux_tc_gate(torch.randn(8, 4), torch.zeros(4), top_k=2)
        >>> tab.moe_experts(x, w13, w2, *routed).shape
        torch.Size([8, 16])
    """
    x, w13, w2 = autocast(x, w13, w2)
    _check_experts(x, w13, w2, weights, index, counts)
    top_k, c = index.shape[-1], x.shape[-1]
    if transforming():  # index and counts may be mapped over
        order, inverse = order_reference(index, counts)
    else:
        order, inverse = moe_order("auto", index, counts)  # (T·k,)
    rows = x.reshape(-1, 1, c).expand(-1, top_k, -1).reshape(-1, c)  # (T·k, C)
    rows = _permute(rows, order, inverse)
    gate, up = moe_grouped.apply("auto", rows, w13, counts).chunk(2, -1)
    y = moe_grouped.apply("auto", F.silu(gate) * up, w2, counts)  # (T·k, C)
    y = _permute(y, inverse, order).unflatten(0, (-1, top_k))  # (T, k, C)
    acc = accumulate(x)
    weighted = y.to(acc) * weights.reshape(-1, top_k, 1).to(acc)
    return weighted.sum(1).to(x.dtype).reshape(x.shape)


def _check_experts(x, w13, w2, weights, index, counts) -> None:
    tensors = {"x": x, "w13": w13, "w2": w2, "weights": weights, "index": index}
    check_tensors("moe_experts", **tensors, counts=counts)
    rule = None
    e, c, f = w2.shape if w2.dim() == 3 else (0, 0, 0)
    if x.dim() < 2 or w13.shape != (e, 2 * f, c) or x.shape[-1] != c or 0 in (e, c, f):
        rule = "x (…, C), w13 (E, 2F, C), w2 (E, C, F), E, C, F ≥ 1"
    elif index.shape[:-1] != x.shape[:-1] or weights.shape != index.shape or counts.shape != (e,):
        rule = "weights, index (…, k) with x's leading sizes and counts (E,)"
    elif {index.dtype, counts.dtype} != {torch.int64} or not weights.is_floating_point():
        rule = "floating weights, index and counts in int64"
    elif len({t.device for t in (x, weights, index, counts)}) > 1:
        rule = "one device"
    if rule:
        raise ValueError(f"moe_experts wants {rule}; got {shapes(**tensors, counts=counts)}")
    same("moe_experts", x=x, w13=w13, w2=w2)
