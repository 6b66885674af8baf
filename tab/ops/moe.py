"""Mixture of experts: a router that picks k of E experts per token, and the experts themselves.

    s = σ(logits),  index = topk_k(s + b),  w = route_scale · s[index]/(Σ s[index] + 1e-20)
    y = Σ_i w_i W2_e(silu(W1_e x) ∘ W3_e x),  e = index_i

DeepSeek-V3 2024, eq. 12-16: the bias b steers the selection and never the weights, so balance costs
no gradient ("noaux_tc": no auxiliary loss). T tokens, E experts, k of them per token, width F.

No loop over experts in Python but on the CPU, no device sync: tokens are sorted by expert, and one
grouped matrix product serves all groups, whose sizes stay on the device: PyTorch's own where it
does not ask for them, a Triton kernel elsewhere (kernels/moe.py), padded blocks without Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import exporting, transforming
from ._check import accumulate, autocast, same, shapes
from ._op import Op, no_flops

# --- router ---------------------------------------------------------------------------------------


def noaux_tc_gate(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    route_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid top-k routing with a selection bias (DeepSeek-V3 2024, eq. 13-16), in float32.

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
    """
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


# --- grouped matrix product -----------------------------------------------------------------------


def grouped_reference(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """x (M, I) sorted by group, w (E, O, I), counts (E,) -> y (M, O), y_m = W_e(m) x_m."""
    if x.device.type == "meta":
        return x.new_empty(x.shape[0], w.shape[1])
    if torch.is_grad_enabled() or transforming():  # what PyTorch differentiates, and maps
        return grouped_in_blocks(x, w, counts)
    if x.device.type == "cpu":
        y = x.new_empty(x.shape[0], w.shape[1])
        for e, rows in _slices(x, counts):
            torch.mm(x[rows], w[e].mT, out=y[rows])
        return y
    if native(x, w):
        return torch._grouped_mm(x, w.mT, offs=counts.cumsum(0).to(torch.int32))
    return grouped_in_blocks(x, w, counts)


def grouped_outer_reference(g: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """g (M, O), x (M, I), both sorted by group -> dW (E, O, I), dW_e = Σ_m∈e g_m x_mᵀ."""
    shape = counts.shape[0], g.shape[1], x.shape[1]
    if x.device.type == "meta":
        return x.new_empty(shape)
    if x.device.type == "cpu":
        dw = x.new_zeros(shape)
        for e, rows in _slices(x, counts):
            torch.mm(g[rows].mT, x[rows], out=dw[e])
        return dw
    if native(x, g):
        dw = torch._grouped_mm(g.mT, x, offs=counts.cumsum(0).to(torch.int32))
        # On sm_100 it leaves an empty group unwritten (pytorch/pytorch issue 172439).
        return dw.masked_fill_((counts == 0)[:, None, None], 0.0)
    return grouped_outer_in_blocks(g, x, counts)


def _slices(x: Tensor, counts: Tensor) -> list[tuple[int, slice]]:
    """The rows of each group that has any."""
    sizes = counts.tolist()
    if sum(sizes) != x.shape[0] or min(sizes) < 0:
        raise ValueError(f"moe_experts: counts {sizes} do not sum to the {x.shape[0]} routed rows")
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    return [(e, slice(a, a + n)) for e, (a, n) in enumerate(zip(starts, sizes, strict=True)) if n]


def native(*tensors: Tensor) -> bool:
    """Where torch._grouped_mm runs without asking the device for the group sizes: bfloat16 on
    sm_90 and sm_100, every row a multiple of 16 bytes. Elsewhere it loops and synchronises."""
    return torch.cuda.get_device_capability(tensors[0].device)[0] in (9, 10) and all(
        x.dtype == torch.bfloat16
        and x.data_ptr() % 16 == 0
        and x.shape[1] % 8 == 0
        and all(stride == 1 or stride % 8 == 0 for stride in x.stride())
        for x in tensors
    )


def grouped_in_blocks(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """The same product as batched GEMMs of padded blocks: any dtype and alignment, and the shapes
    do not depend on the sizes of the groups. At most twice the rows, and twice the weights read."""
    place, owner, size = _blocks(x.shape[0], counts)
    padded = x.new_zeros(owner.shape[0] * size, x.shape[1]).index_copy(0, place, x)
    y = padded.unflatten(0, (-1, size)) @ w[owner].mT  # (blocks, size, O)
    return y.flatten(0, 1)[place]


def grouped_outer_in_blocks(g: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    place, owner, size = _blocks(x.shape[0], counts)
    padded = (
        t.new_zeros(owner.shape[0] * size, t.shape[1]).index_copy(0, place, t) for t in (g, x)
    )
    pg, px = (t.unflatten(0, (-1, size)) for t in padded)  # (blocks, size, O), (blocks, size, I)
    acc = accumulate(x)
    dw = torch.zeros(counts.shape[0], g.shape[1], x.shape[1], dtype=acc, device=x.device)
    # Sorts where index_add would add in any order: the same bits each time.
    return dw.index_put((owner,), (pg.mT @ px).to(acc), accumulate=True).to(x.dtype)


def _blocks(rows: int, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """-> each row's place among the padded rows (M,), each block's group, the rows of a block.

    Group e takes ⌈count/size⌉ blocks; with size ≈ M/E they are at most M/size + E.
    """
    experts = counts.shape[0]
    size = max(1, -(-rows // experts))
    blocks = -(-rows // size) + experts
    used = (counts + size - 1) // size  # (E,)
    ends, block_ends = counts.cumsum(0), used.cumsum(0)
    row = torch.arange(rows, device=counts.device)
    group = torch.searchsorted(ends, row, right=True)  # (M,)
    place = row - (ends - counts)[group] + (block_ends - used)[group] * size
    owner = torch.searchsorted(block_ends, torch.arange(blocks, device=counts.device), right=True)
    return place, owner.clamp(max=experts - 1), size


def _flops(x, w, *_, **__) -> int:
    """Each of the M routed rows by its expert's (O, I)."""
    return 2 * x[0] * w[1] * w[2]


def _outer_flops(g, x, *_, **__) -> int:
    """Each of the M rows into its expert's (O, I)."""
    return 2 * x[0] * g[1] * x[1]


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
moe_grouped = Op(
    "moe_grouped",
    "(Tensor x, Tensor w, Tensor counts) -> Tensor",
    grouped_reference,
    flops=_flops,
)
moe_grouped_outer = Op(
    "moe_grouped_outer",
    "(Tensor g, Tensor x, Tensor counts) -> Tensor",
    grouped_outer_reference,
    flops=_outer_flops,
)

# --- autograd -------------------------------------------------------------------------------------


def _gradients(backend, grads, x, w, counts, y):
    g = grads[0].contiguous()
    return moe_grouped.below(backend, g, w.mT, counts), moe_grouped_outer.below(
        backend, g, x, counts
    )


moe_grouped.differentiable(_gradients, by=moe_grouped_outer)


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


def _check_gate(logits, bias, top_k, n_group, topk_group) -> int:
    """-> E"""
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


def _check_experts(x, w13, w2, weights, index, counts) -> None:
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
        tensors = {"x": x, "w13": w13, "w2": w2, "weights": weights, "index": index}
        raise ValueError(f"moe_experts wants {rule}; got {shapes(**tensors, counts=counts)}")
    same("moe_experts", x=x, w13=w13, w2=w2)
