"""Grouped matrix products: rows sorted by group, and one matrix a group.

    y_m = W_e(m) x_m,   dW_e = Σ_m∈e g_m x_mᵀ

No loop over groups in Python but on the CPU, no device sync: the sizes of the groups stay on the
device. PyTorch's own product serves where it does not ask for them, a Triton kernel elsewhere
(kernels/moe.py), padded blocks without Triton. M rows, E groups, I numbers in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._autograd import transforming
from ._check import accumulate
from ._op import Op


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
        return F.grouped_mm(x, w.mT, offs=counts.cumsum(0).to(torch.int32))
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
        dw = F.grouped_mm(g.mT, x, offs=counts.cumsum(0).to(torch.int32))
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
    """Where PyTorch's grouped_mm is there and runs without asking the device for the group sizes:
    bfloat16 on sm_90 and sm_100, every row a multiple of 16 bytes. Elsewhere it loops and waits."""
    if not hasattr(F, "grouped_mm"):
        return False
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
    """The same sums as batched GEMMs of padded blocks, and a sorted sum over those of a group."""
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


moe_grouped = Op(
    "moe_grouped",
    "(Tensor x, Tensor w, Tensor counts) -> Tensor",
    grouped_reference,
    flops=_flops,
    shapes="""
        x: M I
        w: G O I
        counts: G
    """,
)
moe_grouped_outer = Op(
    "moe_grouped_outer",
    "(Tensor g, Tensor x, Tensor counts) -> Tensor",
    grouped_outer_reference,
    flops=_outer_flops,
    shapes="""
        g: M O
        x: M I
        counts: G
    """,
)


def _gradients(backend, grads, x, w, counts, y):
    g = grads[0].contiguous()
    return moe_grouped.below(backend, g, w.mT, counts), moe_grouped_outer.below(
        backend, g, x, counts
    )


moe_grouped.differentiable(_gradients, by=moe_grouped_outer)
