"""The router of a mixture of experts: which k of E experts a token goes to, and with what weights.

    s = σ(logits),  index = topk_k(s + b),  w = route_scale · s[index]/(Σ s[index] + 1e-20)

DeepSeek-V3 2024, eq. 13-16: the bias b steers the selection and never the weights, so balance costs
no gradient ("noaux_tc": no auxiliary loss). E experts, k of them per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import accumulate, check_tensors, shapes
from ._options import finite, whole


def noaux_tc_gate(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid top-k routing with a selection bias, in float32: of s = σ(logits), the k experts of
    the largest s + bias get the weights route_scale·s / Σ s (DeepSeek-V3 2024, eq. 13-16).

    Args:
        logits: (…, E), floating; the router's scores before the sigmoid.
        bias: (E,), floating; added for the selection only, gets no gradient. −inf shuts an expert.
        top_k: experts per token.
        n_group, topk_group: the experts form n_group equal groups; only the topk_group groups with
            the largest sum of their two best biased scores can be selected.
        route_scale: the weights of a token sum to it, unless all their scores underflow.

    Returns:
        weights (…, k) float32 (float64 for float64 input), differentiable in logits; NaN where an
        expert had to be chosen whose biased score is NaN or −inf, as of a token that is NaN;
        index (…, k) int64; counts (E,) int64, tokens per expert.

    Raises:
        ValueError: shapes or numbers do not fit; the message prints them.

    Example: two tokens, each to two of four experts; the bias lifts expert 0 into the choice of
    the first, where its own score still sets its weight.
        >>> logits = torch.tensor([[0.0, 1.0, 2.0, 0.5], [3.0, 1.0, 0.0, 0.0]])
        >>> bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
        >>> weights, index, counts = tab.noaux_tc_gate(logits, bias, top_k=2)
        >>> index.tolist(), counts.tolist()
        ([[0, 2], [0, 1]], [2, 1, 1, 0])
        >>> torch.allclose(weights.sum(-1), torch.ones(2))
        True
    """
    name = "noaux_tc_gate"
    top_k, n_group = whole(name, "top_k", top_k), whole(name, "n_group", n_group)
    topk_group = whole(name, "topk_group", topk_group)
    if not isinstance(route_scale, Tensor):  # a learned one keeps its gradient
        route_scale = finite(name, "route_scale", route_scale)
    experts = _check_gate(logits, bias, top_k, n_group, topk_group)
    scores = logits.to(accumulate(logits)).sigmoid()  # (…, E)
    with torch.no_grad():
        choice = scores + bias.to(scores.dtype)
        if topk_group < n_group:
            groups = choice.unflatten(-1, (n_group, -1))  # (…, G, E/G)
            best = groups.topk(min(2, experts // n_group), -1).values.sum(-1)  # (…, G)
            dropped = torch.ones_like(best, dtype=torch.bool)
            dropped = dropped.scatter(-1, best.topk(topk_group, -1).indices, False)
            # −inf and not 0: with a negative bias a dropped expert at 0 would win.
            choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
        best, index = choice.topk(top_k, -1)  # (…, k)
    picked = scores.gather(-1, index)
    weights = picked / (picked.sum(-1, keepdim=True) + 1e-20) * route_scale
    weights = weights.masked_fill(~(best > -torch.inf), torch.nan)
    return weights, index, expert_counts(index, experts)


def expert_counts(index: Tensor, experts: int, key_mask: Tensor | None = None) -> Tensor:
    """index (…, k) -> how many tokens chose each expert, (E,) int64; of the real ones only where
    key_mask (…) is given. Stays on the device (bincount would ask it for the largest index)."""
    ones = torch.ones_like(index) if key_mask is None else key_mask[..., None].expand_as(index)
    zeros = torch.zeros(experts, dtype=torch.int64, device=index.device)
    return zeros.scatter_add(0, index.flatten(), ones.to(torch.int64).flatten())


def _check_gate(logits, bias, top_k, n_group, topk_group) -> int:
    """-> E"""
    check_tensors("noaux_tc_gate", logits=logits, bias=bias)
    experts = logits.shape[-1] if logits.dim() > 1 else -1
    floating = logits.is_floating_point() and bias.is_floating_point()
    fits = bias.shape == (experts,) and bias.device == logits.device and experts > 0
    if not (floating and fits):
        raise ValueError(
            "noaux_tc_gate wants floating logits (…, E), E ≥ 1, and bias (E,) on one device; "
            f"got {shapes(logits=logits, bias=bias)}"
        )
    if n_group < 1 or experts % n_group:
        divisors = [g for g in range(1, experts + 1) if experts % g == 0]
        raise ValueError(
            f"n_group={n_group} does not divide the {experts} experts; nearest choice: "
            f"{min(divisors, key=lambda g: abs(g - n_group))}"
        )
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group={topk_group}: choose 1 to n_group={n_group}")
    available = topk_group * (experts // n_group)
    if not 1 <= top_k <= available:
        raise ValueError(
            f"top_k={top_k}: {topk_group} of {n_group} groups hold {available} of the {experts} "
            f"experts; choose 1 to {available}"
        )
    return experts
