"""Floating-point operations of one forward pass, per image: matrix products and convolutions.

PyTorch's counter knows its own operators. TAB's are counted here by what their formulas need,
two a multiply-add, whatever a kernel or a reference does beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .backbones import IMAGE
from .ops import OPS
from .ops.local import in_window


def _linear(q, k, v, *_, **__) -> int:
    """S = φ(k)ᵀv and φ(q)ᵀS: 4·D·Dv a token and head."""
    b, h, n, d = q
    return 4 * b * h * n * d * v[-1]


def _performer(q, k, v, projection, *_, **__) -> int:
    """W q and W k, then linear attention on M features: 4·M·(D + Dv)."""
    b, h, n, d = q
    return 4 * b * h * n * projection[0] * (d + v[-1])


def _local(q, k, v, left, right, rows, cols, causal, *_, **__) -> int:
    """Scores and sums over the pairs that the window holds: 2·(D + Dv) a pair."""
    b, h, n, d = q
    i = torch.arange(n)
    pairs = in_window(i[:, None], i, left, right, cols, causal).sum().item()
    return 2 * b * h * pairs * (d + v[-1])


def _sparse(q, k, v, row_ptr, col, col_ptr, row, block_size, *_, **__) -> int:
    """The same over the pairs in the blocks of the pattern, each counted whole."""
    b, h, _, d = q
    blocks = col[0] * h // row_ptr[0]  # a pattern is per head, or shared by all
    return 2 * b * blocks * block_size**2 * (d + v[-1])


def _mla(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *_, **__) -> int:
    """K and V from the latent, then scores over Dn + Dr and sums over Dv."""
    b, h, n, dn = q_nope
    r, dv = c_kv[-1], w_uv[1]
    return 2 * b * h * n * (r * (dn + dv) + n * (dn + q_rope[-1] + dv))


FORMULAS = {  # op -> FLOPs from the shapes of its arguments
    "linear_fwd": _linear,
    "performer_fwd": _performer,
    "local_fwd": _local,
    "sparse_fwd": _sparse,
    "mla_fwd": _mla,
}


def _formula(name: str) -> Callable[..., int]:
    """The op's own, else the one above; an op that has none is not counted as 0."""

    def unknown(*_, **__) -> int:
        raise ValueError(f"tab::{name} has no FLOP formula: give its Op one, `flops=`")

    return OPS[name].flops or FORMULAS.get(name) or unknown


def forward_flops(model: nn.Module) -> int:
    """FLOPs of the model on one image, by running it once where it is: on the CPU, or on meta."""
    mapping = {getattr(torch.ops.tab, name): _formula(name) for name in OPS}
    x = torch.zeros(1, 3, IMAGE, IMAGE, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    # Fused softmax attention is taken apart into the two products that define it.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(x)
    model.train(training)
    return counter.get_total_flops()
