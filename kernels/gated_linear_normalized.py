"""Gated linear attention that is divided by its denominator, for CUDA in Triton: the kernels of
gated_linear*.py, which take z with S (tab/ops/gated_linear_normalized.py).

z and the denominator are float32 sums, whatever q, k and v are multiplied in.
"""

from functools import partial

import torch

from tab.ops._heads import groups_backward, groups_forward

from . import gated_linear, gated_linear_backward
from ._launch import meta_tensor, outside, precision, register, register_packed
from .gated_linear import packed_walk, walk

# D and Dv. With z, too, a float32 state 128 wide would spill 3568 bytes a thread in the backward.
MAX_SIZE = {"bf16": 256, "tf32": 256, "tf32x3": 64}

# --- launcher -------------------------------------------------------------------------------------


def takes(q, k, v, *_) -> str | None:
    sizes = {"D": q.shape[-1], "Dv": v.shape[-1]}
    return gated_linear.takes(q, k, v) or outside(q, MAX_SIZE[precision(q)], **sizes)


@partial(groups_forward, lse=True)
def forward(*args):
    """tab::gated_linear_normalized_fwd"""
    return walk(*args, 1.0, True, True)


@partial(groups_forward, lse=True)
def stateless(*args):
    """tab::gated_linear_normalized_stateless_fwd"""
    o, _, _, den = walk(*args, 1.0, False, True)
    return o, den


@partial(groups_backward, states=2)
def backward(*args, state=True):
    """tab::gated_linear_normalized_bwd; dS₀ and dz₀ may be None without `state`."""
    return gated_linear_backward.walk(*args, 1.0, state)


def stateless_backward(do, ds, dz, q, k, *rest):
    """tab::gated_linear_normalized_stateless_bwd"""
    if q.shape[1] == k.shape[1]:
        return gated_linear_backward.walk(do, ds, dz, q, k, *rest, 1.0, False)[:4]
    return backward(do, ds, dz, q, k, *rest)[:4]  # each head of q has a share of dS₀, too


def packed(ends, *args):
    """tab::gated_linear_normalized_packed_fwd"""
    return packed_walk(ends, *args, 1.0, True)


def packed_backward(
    ends, q, k, v, log_decay, key_mask, s0, z0, o, s, z, den, do, ds, dz, cu_seqlens
):
    """tab::gated_linear_normalized_packed_bwd"""
    do = torch.zeros_like(o) if do is None else do
    given = q, k, v, log_decay, o, den, key_mask, s0, z0, do, ds, dz, cu_seqlens
    return gated_linear_backward.packed_walk(ends, *given, 1.0)


# --- compiled ahead -------------------------------------------------------------------------------


def cases():
    for *x, s0, _ in gated_linear.cases():
        if takes(*x) is None:
            yield *x, s0, s0[..., 0]


def backward_cases():
    for q, k, v, g, mask, s0, z0 in cases():
        den = meta_tensor(*q.shape[:3])
        yield v, s0, z0, q, k, v, g, v, den, mask, s0, z0


def stateless_cases():
    """One launch."""
    for *x, _, _ in list(cases())[:2]:
        yield *x, None, None


def stateless_backward_cases():
    for _, _, _, *x, _, _ in list(backward_cases())[:2]:
        yield x[2], None, None, *x, None, None


def packed_cases():
    for *x, s0, ends, _ in gated_linear.packed_cases():
        yield *x, s0, s0[..., 0], ends


def packed_backward_cases():
    for q, k, v, g, mask, s0, z0, ends in packed_cases():
        den = meta_tensor(*q.shape[:3])
        yield q, k, v, g, mask, s0, z0, v, s0, z0, den, v, s0, z0, ends


NAME = "gated_linear_normalized"
register(f"{NAME}_fwd", forward, takes=takes, cases=cases)
register(f"{NAME}_bwd", backward, takes=lambda do, ds, dz, *x: takes(*x), cases=backward_cases)
register(f"{NAME}_stateless_fwd", stateless, takes=takes, cases=stateless_cases)
register(
    f"{NAME}_stateless_bwd", stateless_backward, takes=lambda do, ds, dz, *x: takes(*x),
    cases=stateless_backward_cases,
)  # fmt: skip
register_packed(f"{NAME}_packed_fwd", packed, cases=packed_cases)
register_packed(f"{NAME}_packed_bwd", packed_backward, cases=packed_backward_cases)
